"""Every family: parameters as published, a feature a stage, parts, compilation, transforms, memory layout."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

from kdfast.methods import SelfGuidance
from kdfast.methods.stochastic_depth import residual_branches, scaled
from kdfast.models import VGG, FourStageResNet, ResNeXt29, WideResNet, create, names

FAMILIES = {  # name: (options that make it small, sides of the maps of a 32x32 image)
    "resnet8": ({"widths": (2, 4, 6)}, (32, 16, 8)),
    "resnet8x4": ({"widths": (4, 6, 8), "stem": 3}, (32, 16, 8)),
    "resnet18": ({"width": 2}, (32, 16, 8, 4)),
    "resnet50": ({"width": 2}, (32, 16, 8, 4)),
    "wrn_16_1": ({}, (32, 16, 8)),
    "vgg8_bn": ({}, (32, 16, 8, 4, 4)),
    "mobilenetv2": ({}, (16, 8, 4, 2)),
    "shufflenetv1": ({}, (16, 8, 4)),
    "shufflenetv2": ({}, (16, 8, 4)),
    "resnext29": ({"cardinality": 2, "base_width": 4}, (32, 16, 8)),
}


def parameters(name, classes):
    with torch.device("meta"):
        return sum(p.numel() for p in create(name, classes).parameters())


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    # The layers of RepDistiller's models (github.com/HobbitLong/RepDistiller, models/*.py), which CRD and most later
    # papers on CIFAR-100 train, added up one by one.
    [
        ("resnet8", 100, 83_892),
        ("resnet14", 100, 181_108),
        ("resnet20", 100, 278_324),  # "0.28M"
        ("resnet32", 100, 472_756),
        ("resnet44", 100, 667_188),
        ("resnet56", 100, 861_620),  # "0.86M"
        ("resnet110", 100, 1_736_564),  # "1.74M"
        ("resnet8x4", 100, 1_233_540),  # "1.23M"
        ("resnet32x4", 100, 7_433_860),  # "7.43M"
        ("wrn_16_1", 100, 180_916),
        ("wrn_16_2", 100, 703_284),  # "0.70M"
        ("wrn_40_1", 100, 569_780),  # "0.57M"
        ("wrn_40_2", 100, 2_255_156),  # "2.26M"
        ("vgg8_bn", 100, 3_965_028),  # "3.97M"
        ("vgg13_bn", 100, 9_462_180),  # "9.46M"
        ("mobilenetv2", 100, 812_836),  # "0.81M"
        ("shufflenetv1", 100, 949_258),  # "0.95M"
        ("shufflenetv2", 100, 1_355_528),  # "1.36M"
    ],
)
def test_parameter_count_is_that_of_the_layers(name, classes, count):
    assert parameters(name, classes) == count


@pytest.mark.parametrize(
    ("name", "classes", "millions", "unit"),
    [
        # Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019: CIFAR-100/README.md of its code
        ("wrn_28_4", 100, 5.87, 0.01),
        ("wrn_16_4", 100, 2.77, 0.01),
        ("wrn_28_2", 100, 1.47, 0.01),
        ("wrn_16_2", 100, 0.70, 0.01),
        ("resnet56", 100, 0.86, 0.01),
        # Zagoruyko, Komodakis, "Wide Residual Networks", table 4
        ("wrn_40_1", 10, 0.6, 0.1),
        ("wrn_40_2", 10, 2.2, 0.1),
        ("wrn_28_10", 10, 36.5, 0.1),
        # Xie et al., "Aggregated Residual Transformations", table 7
        ("resnext29", 10, 34.4, 0.1),
        # github.com/bearpaw/pytorch-classification, README.md: on CIFAR-10
        ("resnext29", 10, 34.43, 0.01),
        ("vgg19_bn", 10, 20.04, 0.01),
        ("wrn_28_10", 10, 36.48, 0.01),
        # github.com/weiaicunzai/pytorch-cifar100, README.md: on CIFAR-100
        ("resnet18", 100, 11.2, 0.1),
        ("resnet34", 100, 21.3, 0.1),
        ("resnet50", 100, 23.7, 0.1),
        ("resnet101", 100, 42.7, 0.1),
        ("resnet152", 100, 58.3, 0.1),
    ],
)
def test_parameter_count_is_the_published_one(name, classes, millions, unit):
    assert abs(parameters(name, classes) / 1e6 - millions) < unit  # some round, some cut the next digit off


@pytest.mark.parametrize(
    ("teacher", "student", "ratio"),
    # Zhao, Chen, Zhao, "A Contrastive Knowledge Transfer Framework", ICASSP 2023, table 1: compression ratios
    [
        ("wrn_40_2", "wrn_16_2", 3.21),
        ("wrn_40_2", "wrn_40_1", 3.96),
        ("resnet56", "resnet20", 3.10),
        ("resnet110", "resnet20", 6.24),
        ("resnet110", "resnet32", 3.67),
        ("resnet32x4", "resnet8x4", 6.03),
        ("vgg13_bn", "vgg8_bn", 2.39),
    ],
)
def test_pairs_have_the_published_compression_ratio(teacher, student, ratio):
    assert parameters(teacher, 100) / parameters(student, 100) == pytest.approx(ratio, abs=0.005)


def test_every_name_can_be_made_and_is_in_the_documentation():
    rows = (Path(__file__).parents[2] / "docs/models.md").read_text()
    with torch.device("meta"):
        for name in names():
            network = create(name, classes=100)
            logits, features = network(torch.empty(2, 3, 32, 32), features=True)
            assert logits.shape == (2, 100)
            assert tuple(feature.shape[1] for feature in features) == network.widths
            count = sum(p.numel() for p in network.parameters())
            widths, sides = (", ".join(str(f.shape[i]) for f in features) for i in (1, 2))
            assert f"| `{name}` | {count:,} | {widths} | {sides} |" in rows


@pytest.fixture(params=FAMILIES)
def family(request):
    torch.manual_seed(0)
    options, sides = FAMILIES[request.param]
    network = create(request.param, classes=5, in_channels=2, **options)
    network(torch.randn(4, 2, 32, 32))  # running statistics that matter
    return network.eval(), sides


def test_features_are_the_stages_and_the_parts_are_the_network(family):
    network, sides = family
    images = torch.randn(2, 2, 32, 32)
    logits, features = network(images, features=True)
    assert torch.equal(network(images), logits) and logits.shape == (2, 5)
    assert [tuple(f.shape) for f in features] == [(2, w, s, s) for w, s in zip(network.widths, sides, strict=True)]
    stages, head = network.parts()
    x = images
    for stage, feature in zip(stages, features, strict=True):
        x = stage(x)
        assert torch.equal(x, feature)
    assert torch.equal(head(x), logits)
    held = {id(p) for module in (*stages, head) for p in module.parameters()}
    assert held == {id(p) for p in network.parameters()}


def test_every_parameter_learns(family):
    network, _ = family
    network.train()(torch.randn(4, 2, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_compiles_whole_transforms_and_runs_with_channels_last(family):
    network, _ = family
    network.double()
    images = torch.randn(2, 2, 32, 32, dtype=torch.float64)
    expected = network(images, features=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: network(x, features=True), fullgraph=True, backend="eager")(images)
    torch.testing.assert_close(compiled, expected)

    parameters = dict(network.named_parameters())
    direction = {name: torch.randn_like(p) * p.abs().mean() for name, p in parameters.items()}

    def logits(values):
        return functional_call(network, values, (images,))

    value, tangent = torch.func.jvp(logits, (parameters,), (direction,))
    torch.testing.assert_close(value, expected[0])
    step = 1e-7  # so short that hardly a ReLU bends in between
    ahead, behind = (logits({n: p + sign * step * direction[n] for n, p in parameters.items()}) for sign in (1, -1))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-4)

    last = network.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last), features=True)
    torch.testing.assert_close(last, expected)


@pytest.mark.parametrize(
    ("name", "count"), [("resnet8", 3), ("resnet18", 8), ("resnet50", 16), ("wrn_16_1", 6), ("resnext29", 9)]
)
def test_self_guidance_finds_the_branches_and_removes_them(name, count):
    """With all branches left out a residual block is its shortcut."""
    options, _ = FAMILIES[name]
    network = create(name, classes=5, in_channels=2, **options)
    branches = residual_branches(network)
    assert len(branches) == len(set(branches)) == count
    distiller = SelfGuidance(network).eval()
    images = torch.randn(2, 2, 32, 32)
    sub = distiller._run(images, scaled(network, distiller._scales, torch.zeros(count)))
    x = network.stem(images)
    for stage in network.stages:
        for block in stage:
            shortcut = block.shortcut
            if name.startswith("wrn"):
                x = x if shortcut is None else shortcut(torch.relu(block.bn1(x)))
            else:
                x = torch.relu(shortcut(x))
    torch.testing.assert_close(sub, network.head(x))
    torch.testing.assert_close(distiller.export().eval()(images), distiller.student_outputs(images).full)
    distiller.train()
    outputs = distiller.student_outputs(torch.randn(4, 2, 32, 32))
    assert outputs.sub is not None
    sum(distiller.losses(outputs, None, torch.tensor([0, 1, 2, 3])).values()).backward()


@pytest.mark.parametrize("name", ["vgg8_bn", "mobilenetv2", "shufflenetv1", "shufflenetv2"])
def test_self_guidance_takes_no_network_whose_blocks_are_not_all_residual(name):
    with pytest.raises(ValueError, match="has no residual blocks known here; name the last layer"):
        SelfGuidance(create(name))


def test_any_depth_by_name_and_unknown_names():
    with torch.device("meta"):
        assert create("resnet26").depth == 26 and create("wrn_22_3").widths == (48, 96, 192)
        assert isinstance(create("resnet50"), FourStageResNet)  # not the three-stage network of the same depth
    for name in ("resnet9000x", "wrn_16", "vgg9_bn", "resnext29_"):
        with pytest.raises(
            ValueError, match=rf"must be one of resnet8, .*, torchvision:NAME or timm:NAME, got '{name}'"
        ):
            create(name)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: FourStageResNet(20), r"depth must be one of 18, 34, 50, 101, 152, got 20"),
        (lambda: VGG(9), r"depth must be one of 8, 11, 13, 16, 19, got 9"),
        (lambda: WideResNet(18, 1), r"depth must be 6n\+4 with n >= 1 \(10, 16, 22, ...\), got 18"),
        (lambda: WideResNet(16, 0), r"factor must be at least 1, got 0"),
        (lambda: ResNeXt29(0), r"cardinality and base_width must be at least 1, got 0 and 64"),
        (lambda: create("mobilenetv2", width=0.01), r"width must be at least 1/16, got 0.01"),
    ],
)
def test_impossible_shapes_are_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_deeper_networks_have_the_layers_in_their_names():
    def convolutions(name):
        with torch.device("meta"):
            network = create(name)
        return sum(m.kernel_size != (1, 1) or "shortcut" not in n for n, m in network.named_modules() if _is_conv(m))

    named = {"resnet34": 34, "resnet101": 101, "resnet152": 152, "vgg16_bn": 14, "vgg19_bn": 17, "resnext29": 29}
    assert {name: convolutions(name) + 1 for name in named} == named  # and the linear layer; VGG has lost two of three
    assert all(a < b for a, b in pairwise(parameters(f"vgg{d}_bn", 10) for d in (8, 11, 13, 16, 19)))


def _is_conv(module):
    return isinstance(module, torch.nn.Conv2d)

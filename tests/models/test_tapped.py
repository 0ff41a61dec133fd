"""Tapped: the layers' own outputs, in both modes, on the network's own parameters."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from kdfast._torchvision import import_module
from kdfast.methods import AT, KD, Alone, DistPro, SelfGuidance
from kdfast.models import CifarResNet, Tapped, create
from kdfast.models.tapped import bare

BLACK = torch.zeros(1, 3, 32, 32)
VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 12, "depth": 2, "num_heads": 2, "drop_path_rate": 0.5}


def vit():
    return create("timm:vit_tiny_patch16_224", classes=5, **VIT)


NETWORKS = {
    "torchvision resnet": (
        lambda: create("torchvision:resnet18", classes=5),
        # bn2 is changed in place by the sum that follows it, relu by nothing
        {"layer1.0.bn2": (64, 8, 8), "layer1": (64, 8, 8), "layer4": (512, 1, 1)},
    ),
    "torchvision shufflenet": (
        lambda: create("torchvision:shufflenet_v2_x0_5", classes=5),
        {"conv1.1": (24, 16, 16), "stage2": (48, 4, 4), "stage4": (192, 1, 1)},
    ),
    "torchvision efficientnet": (  # its dropout works in place on what avgpool returns
        lambda: create("torchvision:efficientnet_b0", classes=5),
        {"features.1": (16, 16, 16), "avgpool": (1280, 1, 1)},
    ),
    "timm resnet": (
        lambda: create("timm:resnet10t", classes=5),
        {"layer1": (64, 8, 8), "layer3": (256, 2, 2)},
    ),
    "timm vit": (vit, {"blocks.0": (5, 12), "blocks.1": (5, 12), "norm": (5, 12)}),
    "timm swin": (  # computes maps with the channels last
        lambda: create(
            "timm:swin_tiny_patch4_window7_224", classes=5, img_size=32, window_size=4, embed_dim=6, depths=(1, 1),
            num_heads=(1, 1),
        ),
        {"layers.0": (6, 8, 8), "layers.1": (12, 4, 4)},
    ),
    "kdfast": (
        lambda: CifarResNet(8, (2, 4, 6), classes=5),
        {"stem": (2, 32, 32), "stages.1": (4, 16, 16)},
    ),
}  # fmt: skip


def by_hooks(network, layers, images):
    """Logits and a copy of each layer's output at the moment it is returned."""
    caught, hooks = {}, []
    for layer in layers:
        module = network.get_submodule(layer)
        hooks.append(module.register_forward_hook(lambda m, a, out, name=layer: caught.update({name: out.clone()})))
    logits = network(images)
    for hook in hooks:
        hook.remove()
    return logits, [caught[layer] for layer in layers]


@pytest.mark.parametrize("kind", NETWORKS)
def test_features_are_the_layers_outputs_in_train_and_eval_mode(kind):
    torch.manual_seed(0)
    make, shapes = NETWORKS[kind]
    network = make()
    before = copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()
    tapped = Tapped(network, list(shapes), BLACK)
    assert tapped.training and all(module.training for module in network.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert tapped.widths == tuple(shape[1] if len(shape) == 2 else shape[0] for shape in shapes.values())

    images = torch.randn(4, 3, 32, 32)
    for training in (True, False):
        tapped.train(training)
        plain = copy.deepcopy(network)
        torch.manual_seed(1)
        expected, outputs = by_hooks(plain, shapes, images)
        if kind == "timm swin":
            outputs = [out.permute(0, 3, 1, 2) for out in outputs]
        torch.manual_seed(1)  # dropped paths and units
        logits, features = tapped(images, features=True)
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(features, outputs)
        assert [tuple(f.shape) for f in features] == [(4, *shape) for shape in shapes.values()]
        assert all(torch.equal(value, plain.state_dict()[n]) for n, value in network.state_dict().items())
    assert torch.equal(tapped(images), logits)


def test_gradients_reach_all_parameters_through_logits_and_features():
    tapped = Tapped(vit(), ["blocks.0", "blocks.1"], BLACK)
    tapped.eval()
    logits, features = tapped(torch.randn(2, 3, 32, 32), features=True)
    (logits.sum() + features[0].square().sum()).backward()
    assert all(p.grad is not None for p in tapped.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole(training):
    torch.manual_seed(0)
    tapped = Tapped(create("timm:resnet10t", classes=5), ["layer1", "layer2"], BLACK).train(training)
    images = torch.randn(2, 3, 32, 32)
    other = copy.deepcopy(tapped)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: other(x, features=True), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), tapped(images, features=True))


def test_parameters_given_by_name_are_those_that_run():
    """Also those that no module of torch's own holds, as a transformer's position embedding."""
    tapped = Tapped(vit(), ["blocks.0"], BLACK).eval()
    images = torch.randn(2, 3, 32, 32)
    values = {name: p + 0.1 for name, p in tapped.named_parameters()}
    logits, features = functional_call(tapped, values, (images,), {"features": True})
    moved = copy.deepcopy(tapped)
    moved.load_state_dict({**tapped.state_dict(), **values})
    torch.testing.assert_close((logits, features), moved(images, features=True))
    assert not torch.allclose(features[0], tapped(images, features=True)[1][0])
    double = moved.double()(images.double(), features=True)
    assert double[0].dtype == double[1][0].dtype == torch.float64


def test_state_dict_of_the_bare_model_loads_in_plain_timm():
    tapped = Tapped(create("timm:resnet10t", classes=5), ["layer1"], BLACK)
    assert bare(tapped) is tapped.model and bare(tapped.model) is tapped.model
    theirs = import_module("timm").create_model("resnet10t", num_classes=5)
    theirs.load_state_dict(tapped.model.state_dict())
    assert tapped.state_dict().keys() == {f"model.{name}" for name in theirs.state_dict()}


class Constant(nn.Module):
    """Makes a tensor of its own on the way, and returns a tuple from a layer."""

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.pair, self.unused = nn.Conv2d(3, 4, 1), nn.Linear(4, 2), self.Pair(), nn.ReLU()

    def forward(self, images):
        x, _ = self.pair(self.conv(images))
        return self.linear(x.mean((2, 3)) * torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_constants_of_the_network_move_and_stay_out_of_the_state():
    tapped = Tapped(Constant(), ["conv"])
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(tapped(images, features=True)[0], tapped(images))
    assert tapped.state_dict().keys() == {
        "model.conv.weight",
        "model.conv.bias",
        "model.linear.weight",
        "model.linear.bias",
    }
    assert tapped.to(torch.float64)._tensor_constant0.dtype == torch.float64


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, images):
        x = self.conv(images).mean((2, 3))
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("make", "layers", "sentence"),
    [
        (lambda: create("timm:resnet10t"), ["layer5"], r"A ResNet has no layer 'layer5'; it has layer\d, layer\d, "),
        (lambda: create("timm:resnet10t"), ["layer2.con"], "has no layer 'layer2.con'; it has layer2"),
        (lambda: create("timm:resnet10t"), ["zzz"], "has no layer 'zzz'; it has conv1, bn1, act1"),
        (
            lambda: create("timm:resnet10t"),
            "layer1",
            "layers must be a list of at least one name of a layer, got 'layer1'",
        ),
        (lambda: create("timm:resnet10t"), [], "layers must be a list of at least one name of a layer"),
        (Constant, ["unused"], "The layer 'unused' of the Constant does not run in train mode; choose another"),
        (Constant, ["pair"], "The layer 'pair' of the Constant must return one tensor; choose one inside it"),
        (Branching, ["conv"], r"A Branching cannot be traced by torch.fx \(symbolically traced variables cannot"),
        (vit, ["blocks.0"], r"does not run on images \[2, 3, 64, 64\] \(.*\); give an example"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), ["1"], "Tapped needs an example input"),
    ],
)
def test_what_cannot_be_tapped_is_one_sentence(make, layers, sentence):
    example = torch.zeros(1, 3, 64, 64) if make is vit else None
    with pytest.raises(ValueError, match=sentence):
        Tapped(make(), layers, example)


def test_methods_export_the_bare_network_and_read_the_widths():
    student = Tapped(create("timm:resnet10t", classes=5), ["layer1", "layer2"], BLACK)
    teacher = Tapped(vit(), ["blocks.0", "blocks.1"], BLACK)
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    for distiller in (Alone(student), KD(student, teacher), AT(student, teacher), DistPro(student, teacher)):
        assert distiller.export() is student.model
        outputs, taught = distiller.student_outputs(images), distiller.teacher_outputs(images)
        sum(distiller.losses(outputs, taught, targets).values()).backward()
    assert distiller.student_channels == (64, 128) and distiller.teacher_channels == (12, 12)
    assert not teacher.training and not teacher.model.training
    guided = SelfGuidance(student)
    assert len(guided.branches) == 4
    plain = guided.export()
    assert type(plain) is type(student.model) and plain.state_dict().keys() == student.model.state_dict().keys()
    torch.testing.assert_close(plain.eval()(images), guided.eval().student_outputs(images).full)


def test_network_that_does_not_tell_its_features_names_the_way_out():
    network = create("timm:resnet10t", classes=5)
    with pytest.raises(ValueError, match=r"wrap it in kdfast.models.Tapped .*\(--student-layers on the command line\)"):
        AT(network, CifarResNet(8))

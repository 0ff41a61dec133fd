"""The parts of a Tapped network: one after another they are the network, in both modes, and they are its own."""

import copy

import pytest
import torch
from torch import nn

from kdfast.methods import ONE, StageByStage
from kdfast.models import CifarResNet, Tapped, create
from kdfast.train.loop import ordinary_step

BLACK = torch.zeros(1, 3, 32, 32)
VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 12, "depth": 2, "num_heads": 2, "drop_path_rate": 0.5}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 6, "depths": (1, 1), "num_heads": (1, 1)}

NETWORKS = {
    "torchvision resnet": ("torchvision:resnet18", {}, ["layer1", "layer2", "layer4"]),
    "torchvision shufflenet": ("torchvision:shufflenet_v2_x0_5", {}, ["conv1.1", "stage2", "stage4"]),
    "torchvision mobilenet": ("torchvision:mobilenet_v3_small", {}, ["features.1", "features.4"]),
    # the dropout behind avgpool works in place on what that returns, so the head begins with a copy
    "torchvision efficientnet": ("torchvision:efficientnet_b0", {}, ["features.1", "avgpool"]),
    "timm resnet": ("timm:resnet10t", {}, ["layer1", "layer2", "layer3"]),
    "timm vit": ("timm:vit_tiny_patch16_224", VIT, ["blocks.0", "blocks.1"]),  # parameters outside of layers, tokens
    "timm swin": ("timm:swin_tiny_patch4_window7_224", SWIN, ["layers.0", "layers.1"]),  # channels last inside
    "kdfast": (lambda: CifarResNet(8, (2, 4, 6), classes=5), {}, ["stages.0", "stages.1"]),
}


def tapped(kind):
    torch.manual_seed(0)
    name, options, layers = NETWORKS[kind]
    return Tapped(name() if callable(name) else create(name, classes=5, **options), layers, BLACK)


def run(stages, head, images):
    x, features = images, []
    for stage in stages:
        x = stage(x)
        features.append(x)
    return head(x), features


@pytest.mark.parametrize("kind", NETWORKS)
def test_parts_are_the_network_in_train_and_eval_mode(kind):
    network, images = tapped(kind), torch.randn(4, 3, 32, 32)
    stages, head = network.parts()
    for training in (True, False):
        network.train(training)
        whole = copy.deepcopy(network)
        torch.manual_seed(1)  # dropped paths and units
        expected = whole(images, features=True)
        torch.manual_seed(1)
        got = run(stages, head, images)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        whole = whole.state_dict()
        assert all(torch.equal(value, whole[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_parameter_is_in_one_part_and_learns_as_in_the_network(kind):
    network, images = tapped(kind).eval(), torch.randn(4, 3, 32, 32)
    stages, head = network.parts()
    held = [id(p) for part in (*stages, head) for p in part.parameters()]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in network.parameters()}
    network(images).square().sum().backward()
    expected = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    run(stages, head, images)[0].square().sum().backward()
    torch.testing.assert_close([p.grad for p in network.parameters()], expected)
    assert network.state_dict().keys() == {f"model.{name}" for name in network.model.state_dict()}
    again = network.parts()
    assert again[0] == stages and again[1] is head


@pytest.mark.parametrize("kind", ["torchvision efficientnet", "timm vit", "timm swin"])
def test_parts_follow_mode_and_dtype_and_copies_are_of_the_copy(kind):
    network, images = tapped(kind), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    stages, head = network.parts()
    other = copy.deepcopy(network).double().eval()
    copies = other.parts()
    assert network.training and all(part.training for part in (*stages, head))
    assert not any(part.training for part in (*copies[0], copies[1]))
    got, _ = run(*copies, images)
    torch.testing.assert_close(got, other(images), rtol=0, atol=0)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.9)
    moved, _ = run(*copies, images)
    torch.testing.assert_close(moved, other(images), rtol=0, atol=0)
    assert not torch.equal(moved, got)
    network.double().eval()
    torch.testing.assert_close(run(stages, head, images)[0], got, rtol=0, atol=0)  # as before those were changed


def test_modes_inside_of_the_network_stay():
    network = tapped("timm resnet")
    network.model.bn1.eval()
    modes = [module.training for module in network.modules()]
    (stem, *_), _ = network.parts()
    assert [module.training for module in network.modules()] == modes
    images, before = torch.randn(2, 3, 32, 32), network.model.bn1.running_mean.clone()
    torch.testing.assert_close(stem(images), network(images, features=True)[1][0])
    assert torch.equal(network.model.bn1.running_mean, before)


def test_a_part_compiles_whole():
    network = tapped("timm resnet")
    (_, part, _), _ = network.parts()
    x = torch.randn(4, network.widths[0], 8, 8)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(part, fullgraph=True, backend="eager")(x), part(x))


class Jumps(nn.Module):
    """Its head reads the stem too; its layers share what they compute with."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = (nn.Conv2d(c, 4, 1) for c in (3, 4, 4))
        self.linear = nn.Linear(4, 2)

    def forward(self, images):
        x = self.stem(images)
        return self.linear((self.second(self.first(x)) + x).mean((2, 3)))


class Shared(Jumps):
    def forward(self, images):
        return self.linear(self.second(self.first(self.second(self.stem(images)))).mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "layers", "sentence"),
    [
        (Jumps, ["stem", "first"], r"A Jumps tapped at stem, first: What follows the layer 'first' reads more than its "
         r"output \(stem too\), so .* tap layers that everything passes through"),
        (Shared, ["first"], "second.weight is used by the part that ends in 'first' and by the head, so they are no"),
        (Jumps, ["first", "stem"], r"layers in the order in which they run; 'stem' ends before 'first'"),
    ],
)  # fmt: skip
def test_what_has_no_parts_is_one_sentence(network, layers, sentence):
    tapped = Tapped(network(), layers)
    with pytest.raises(ValueError, match=sentence):
        tapped.parts()
    assert len(tapped(torch.randn(2, 3, 4, 4), features=True)[1]) == len(layers)


@pytest.mark.parametrize("kind", ["torchvision resnet", "timm vit", "timm swin"])
def test_stage_by_stage_trains_one_stage_at_a_time_to_the_bit(kind):
    student, teacher = tapped(kind), tapped(kind)
    count = len(student.layers)
    distiller = StageByStage(student, teacher)
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    stages, head = student.parts()
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    for phase in range(count + 1):
        distiller.start_epoch(phase, count + 1)
        distiller.train()
        assert [part.training for part in (*stages, head)] == [i == phase for i in range(count + 1)]
        before = copy.deepcopy([part.state_dict() for part in (*stages, head)])
        for _ in range(2):
            assert ordinary_step(distiller, (images, targets), optimizer).isfinite()
        for i, (part, old) in enumerate(zip((*stages, head), before, strict=True)):
            moved = {name for name, value in part.state_dict().items() if not torch.equal(value, old[name])}
            learned = {name for name, _ in part.named_parameters()}
            assert moved >= learned if i == phase else not moved, i
    distiller.eval()
    assert torch.equal(distiller.student_outputs(images), student.model(images))


def test_the_teacher_runs_no_further_than_the_stage():
    distiller = StageByStage(tapped("timm resnet"), tapped("torchvision shufflenet"))
    ran = []
    for name in ("stage2.0.branch2.0", "stage3.0.branch2.0", "fc"):
        distiller.teacher.model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    images = torch.randn(4, 3, 32, 32)
    for stage, expected in ((0, []), (1, ["stage2.0.branch2.0"])):
        distiller.set_stage(stage)
        distiller.losses(distiller.student_outputs(images), distiller.teacher_outputs(images), None)
        assert ran == expected


def test_branches_of_one_are_copies_of_the_last_part_and_the_head_alone():
    student = tapped("timm resnet")
    distiller = ONE(student)
    last, head = student.parts()[0][-1], student.parts()[1]
    own = sum(p.numel() for part in (last, head) for p in part.parameters())
    assert all(sum(p.numel() for p in branch.parameters()) == own for branch in distiller.branches)
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    sum(distiller.losses(distiller.student_outputs(images), None, targets).values()).backward()
    assert all(p.grad is not None for p in distiller.parameters())

"""Branches that are left out do not run, and nothing else changes: values, gradients, statistics, random state."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from kdfast.methods import SelfGuidance
from kdfast.methods.left_out import LeftOut
from kdfast.methods.stochastic_depth import branch_parameters
from kdfast.models import CifarResNet, create

VIT = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 12, "num_heads": 3}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 6, "depths": (2, 2), "num_heads": (1, 1)}
NETWORKS = {
    "resnet14": {},  # blocks that end in the ReLU of the sum
    "wrn_16_2": {},  # that return the sum
    "resnext29_2x64d": {},  # bottlenecks
    "torchvision:resnet18": {},  # sum and ReLU in place
    "torchvision:resnet50": {},
    "timm:resnet10t": {},
    "timm:resnetv2_50": {},  # pre-activation
    "timm:vit_tiny_patch16_224": VIT,  # two branches a block
    "timm:vit_tiny_patch16_224 with layer scale": {**VIT, "init_values": 0.01},
    "timm:swin_tiny_patch4_window7_224": SWIN,  # whose attention runs all the same
}


def guided(name, **options):
    torch.manual_seed(0)
    return SelfGuidance(create(name.split()[0], classes=5, **NETWORKS[name]), **options)


def computes_all(distiller):
    """The same, which multiplies what is left out by zero."""
    other = copy.deepcopy(distiller)
    other._is_one_graph = lambda: True
    return other


def step(distiller, seed):
    torch.manual_seed(seed)
    inputs, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    distiller.zero_grad()
    outputs = distiller.train().student_outputs(inputs)
    sum(distiller.losses(outputs, None, labels).values()).backward()
    return outputs, [p.grad for p in distiller.parameters()], torch.get_rng_state()


@pytest.mark.parametrize("teacher_gradient", ["task", "none"])
@pytest.mark.parametrize("name", NETWORKS)
def test_values_gradients_and_statistics_are_those_of_multiplying_by_zero(name, teacher_gradient):
    ours = guided(name, teacher_gradient=teacher_gradient)
    other = computes_all(ours)
    for seed in (1, 2):
        (outputs, gradients, state), expected = step(ours, seed), step(other, seed)
        torch.testing.assert_close((outputs, gradients), expected[:2], rtol=0, atol=0)
        assert torch.equal(state, expected[2])
        buffers = dict(other.student.named_buffers())
        assert all(torch.equal(buffer, buffers[n]) for n, buffer in ours.student.named_buffers())


@pytest.mark.parametrize("name", [name for name in NETWORKS if "swin" not in name])
def test_what_is_left_out_does_not_run(name):
    network, inputs = guided(name).student, torch.randn(2, 3, 32, 32)
    branches = guided(name).branches
    ran, leave = [], LeftOut(branches)
    for branch in branches:  # a layer scale is no module of its own in a trace
        layer = branch.replace("ls1", "attn.proj").replace("ls2", "mlp.fc2")
        network.get_submodule(layer).register_forward_hook(lambda *_, branch=branch: ran.append(branch))
    scales = dict(zip(branches, branch_parameters(network, branches), strict=True))
    for out in (branches[1:], branches[::2], branches, []):
        zeros = {name: 0.0 * network.get_parameter(name) for branch in out for name in scales[branch]}
        for _ in range(2):  # at first the traces are checked
            ran.clear()
            with leave(network, out):
                functional_call(network, zeros, (inputs,))
        assert ran == [branch for branch in branches if branch not in out]
    assert all("forward" not in module.__dict__ for module in network.modules())


class Odd(nn.Module):
    """A residual block whose branch cannot be taken out by what `kind` says."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv1, self.conv2 = kind, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        if self.kind == "changes its input":  # which the shortcut reads too
            x = x.clone()
            return self.conv2(self.conv1(x.relu_())) + x
        if self.kind == "is no sum":
            return x - self.conv2(self.conv1(x))
        if self.kind == "is read twice":
            out = self.conv2(self.conv1(x))
            return x + out + out.mean()
        if self.kind == "has a smaller shortcut":
            return self.conv2(self.conv1(x)) + x.mean((2, 3), keepdim=True)
        if self.kind == "branches on values":
            return x + self.conv2(self.conv1(x)) if x.sum() < 1e6 else x
        return x + self.conv2(self.conv1(x))


@pytest.mark.parametrize(
    "kind", ["changes its input", "is no sum", "is read twice", "has a smaller shortcut", "branches on values", "plain"]
)
def test_what_cannot_be_left_out_is_multiplied_by_zero(kind):
    torch.manual_seed(0)
    network = nn.Sequential(Odd(kind), nn.Flatten(), nn.Linear(12, 2))
    ours = SelfGuidance(network, branches=["0.conv2"])
    ours.survival.zero_()
    ran, x = [], torch.randn(2, 3, 2, 2)
    ours.student_outputs(x)  # at first the trace is checked
    ours.student[0].conv2.register_forward_hook(lambda *_: ran.append(1))
    sub = ours.student_outputs(x).sub
    assert len(ran) == (1 if kind == "plain" else 2)  # the full network runs it
    shortcut = {"changes its input": x.relu(), "has a smaller shortcut": x.mean((2, 3), keepdim=True).expand_as(x)}
    torch.testing.assert_close(sub, network[2](shortcut.get(kind, x).flatten(1)))


class Many(nn.Module):
    """A block with so many branches that a trace for each set of them would be too much."""

    def __init__(self, count):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(count))

    def forward(self, x):
        for conv in self.convs:
            x = x + conv(x)
        return x


@pytest.mark.parametrize("count", [4, 5])
def test_a_block_of_many_branches_runs_them_all(count):
    network, ran = nn.Sequential(Many(count)), []
    branches = [f"0.convs.{i}" for i in range(count)]
    for conv in network[0].convs:
        nn.init.zeros_(conv.weight), nn.init.zeros_(conv.bias)
        conv.register_forward_hook(lambda *_: ran.append(1))
    leave = LeftOut(branches)
    for _ in range(2):
        ran.clear()
        with leave(network, branches[1:]):
            network(torch.randn(2, 3, 4, 4))
    assert len(ran) == (1 if count == 4 else 5)


def test_blocks_are_as_they_were_after_an_error():
    network = CifarResNet(8, (2, 4, 6), classes=2)
    branches = ["stages.0.0.bn2"]
    own = network.stages[0][0].forward = network.stages[0][0].forward  # a forward of the block's own
    leave = LeftOut(branches)
    with leave(network, branches):
        assert network.stages[0][0].forward is not own
    with pytest.raises(RuntimeError), leave(network, branches):
        network(torch.randn(2, 7, 8, 8))
    assert network.stages[0][0].forward is own


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_it_is_one_graph_for_all_draws(whole):
    """The network, or both passes as one."""
    ours = guided("resnet14")
    other = computes_all(ours)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    if whole:
        ours.student_outputs = torch.compile(ours.student_outputs, backend=backend, fullgraph=True)
    else:
        ours.student.compile(backend=backend, fullgraph=True)
    for seed in (1, 2, 3, 4):
        (outputs, gradients, _), expected = step(ours, seed), step(other, seed)
        torch.testing.assert_close((outputs, gradients), expected[:2])
    assert len(graphs) == 1

"""Units held on their sides: the same values where they are, the derivative's difference elsewhere."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from kdfast.meta.kinks import held, recorded, visible


class Kinked(nn.Module):
    """Every function that has kinks, as modules, functions, methods and in place; maxima over overlapping windows."""

    def __init__(self, channels=8):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else channels, channels, 3, padding=1) for i in range(8))
        self.relu, self.relu6, self.pool = nn.ReLU(inplace=True), nn.ReLU6(inplace=True), nn.MaxPool2d(3, 2, 1)

    def forward(self, x):  # [batch, 3, 12, 12]
        x = self.relu(self.convs[0](x))
        x = self.convs[1](x)
        torch.relu_(x)  # nothing returned is used
        x = self.relu6(10 * self.convs[2](x))
        x = F.relu6(10 * self.convs[3](x))
        x = self.pool(x)
        x = F.hardtanh(self.convs[4](x), -0.2, 0.3)
        x, _ = F.max_pool2d(self.convs[5](x).relu(), 2, return_indices=True)
        x = F.relu(self.convs[6](x), True)
        return torch.max_pool2d(torch.relu(self.convs[7](x)), kernel_size=2, stride=1)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Kinked().double(), torch.randn(16, 3, 12, 12, dtype=torch.float64)


def test_recording_changes_nothing(network):
    module, x = network
    plain = module(x)
    expected = torch.autograd.grad(plain.square().sum(), module.parameters())
    output, path = recorded(module, x)
    gradients = torch.autograd.grad(output.square().sum(), module.parameters())
    assert torch.equal(output, plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert len(path.sides) == 11
    assert not any(side.requires_grad for side in path.sides)
    assert not path.constants
    assert torch.equal(held(path, module, x), plain)


def test_difference_is_of_the_smooth_piece(network):
    module, x = network
    theta = dict(module.named_parameters())
    w = {name: torch.randn_like(p) * p.detach().norm() / p.numel() ** 0.5 for name, p in theta.items()}
    _, tangent = torch.func.jvp(lambda p: functional_call(module, p, (x,)), (theta,), (w,))
    _, path = recorded(module, x)

    def error(epsilon, hold):
        at = {name: p.detach() + epsilon * w[name] for name, p in theta.items()}
        with torch.no_grad():
            ahead = held(path, functional_call, module, at, (x,)) if hold else functional_call(module, at, (x,))
            return (((ahead - module(x)) / epsilon - tangent).norm() / tangent.norm()).item()

    assert error(1e-6, hold=True) < 1e-5
    assert error(1e-3, hold=True) < 0.2 * error(1e-3, hold=False)
    assert error(1e-4, hold=True) == pytest.approx(error(1e-3, hold=True) / 10, rel=0.2)  # of first order


class Applied(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.function, self.slope = function, nn.Parameter(torch.linspace(0.1, 0.4, 4))

    def forward(self, x):  # [batch, 3, 8, 8]
        return self.last(self.function(self, 3 * self.first(x)))


FUNCTIONS = {
    "leaky_relu": lambda m, x: F.leaky_relu(x, 0.2),
    "leaky_relu in place": lambda m, x: F.leaky_relu(x, negative_slope=0.2, inplace=True),
    "leaky_relu_": lambda m, x: F.leaky_relu_(x, 0.2),
    "prelu": lambda m, x: F.prelu(x, m.slope),
    "prelu of one": lambda m, x: F.prelu(x, m.slope[:1]),
    "hardswish": lambda m, x: F.hardswish(x),
    "hardswish in place": lambda m, x: F.hardswish(x, True),
    "hardsigmoid": lambda m, x: F.hardsigmoid(x),
    "clamp": lambda m, x: torch.clamp(x, -0.5, 0.5),
    "clamp from below": lambda m, x: x.clamp(min=-0.1),
    "clamp_ from above": lambda m, x: x.clamp_(max=0.3),
    "clamp to what is learned": lambda m, x: x.clamp(max=m.slope.view(-1, 1, 1)),
    "clamp_min": lambda m, x: x.clamp_min(0.0),
    "clip": lambda m, x: torch.clip(input=x, min=0.1),
    "max_pool1d": lambda m, x: F.max_pool1d(x.flatten(2), 4, 2).unsqueeze(2),
    "max_pool3d": lambda m, x: F.max_pool3d(x, (2, 3, 3), (2, 2, 2), (1, 1, 1))[:, :1].expand(-1, 4, -1, -1),
    "adaptive_max_pool2d": lambda m, x: F.adaptive_max_pool2d(x, 3),
    "mask": lambda m, x: x * (x > 0),
    "where": lambda m, x: torch.where(x > 0.5, x, 0.1 * x),
    "argmax": lambda m, x: x * F.one_hot(x.flatten(1).argmax(1), 256).view_as(x),
    "chosen samples": lambda m, x: x[torch.nonzero(x.mean((1, 2, 3)).gt(0), as_tuple=True)],
    "max": lambda m, x: x.max(-1)[0].unsqueeze(-1),
    "min keeping the dimension": lambda m, x: torch.min(x, dim=2, keepdim=True).values,
    "topk": lambda m, x: torch.topk(x, 3, 3)[0],
    "sort": lambda m, x: x.sort(dim=-1, descending=True).values,
    "maximum": lambda m, x: torch.maximum(x, 0.1 * x),
    "minimum": lambda m, x: x.minimum(other=-x),
    "abs": lambda m, x: abs(x),
    "adaptive with places": lambda m, x: F.adaptive_max_pool2d(x, 5, return_indices=True)[0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_is_held(name):
    torch.manual_seed(0)
    module, x = Applied(FUNCTIONS[name]).double(), torch.randn(16, 3, 8, 8, dtype=torch.float64)
    theta = {key: p.detach() for key, p in module.named_parameters()}
    w = {key: torch.randn_like(p) * p.norm() / p.numel() ** 0.5 for key, p in theta.items()}
    plain = module(x)
    output, path = recorded(module, x)
    assert torch.equal(output, plain)
    assert torch.equal(torch.autograd.grad(output.sum(), module.first.weight)[0],
                       torch.autograd.grad(plain.sum(), module.first.weight)[0])  # fmt: skip
    assert sum(side is not None for side in path.sides) == 1
    torch.testing.assert_close(held(path, functional_call, module, theta, (x,)), plain, rtol=1e-14, atol=1e-14)
    _, tangent = torch.func.jvp(lambda p: functional_call(module, p, (x,)), (theta,), (w,))

    def error(epsilon):
        at = {key: p + epsilon * w[key] for key, p in theta.items()}
        return ((held(path, functional_call, module, at, (x,)) - plain) / epsilon - tangent).norm() / tangent.norm()

    assert error(1e-6) < 1e-5
    assert error(1e-3) < 1e-2
    assert error(1e-4) < 0.12 * error(1e-3)  # of first order


def test_comparing_with_nothing_is_no_decision():
    function = lambda x: F.relu(x) if (x == None) is False else x  # noqa: E711, E731
    x = torch.randn(4)
    plain, path = recorded(function, x)
    assert torch.equal(plain, F.relu(x))
    assert torch.equal(held(path, function, x), plain)


def test_channels_last_stays():
    x = torch.randn(2, 5, 6, 6).to(memory_format=torch.channels_last)
    for function in (lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: F.adaptive_max_pool2d(x, 3), F.relu, F.hardswish):
        plain, path = recorded(function, x)
        again = held(path, function, x)
        torch.testing.assert_close(again, plain)
        assert again.stride() == plain.stride()


@pytest.mark.parametrize("change", ["fewer", "more", "another size"])
def test_another_path_is_an_error(change):
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()]
    x = torch.randn(5, 4)
    _, path = recorded(nn.Sequential(*layers), x)
    other = {"fewer": layers[:2], "more": [*layers, nn.ReLU()], "another size": layers}[change]
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"takes another path .* expected .*, got"):
        held(path, nn.Sequential(*other), x[:3] if change == "another size" else x)


def test_compiled_code_is_not_seen():
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert visible(module)
    module[0].compile()
    assert not visible(module)
    assert not visible(nn.Sequential(torch.compile(nn.Linear(2, 2))))

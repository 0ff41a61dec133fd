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
    output, sides = recorded(module, x)
    gradients = torch.autograd.grad(output.square().sum(), module.parameters())
    assert torch.equal(output, plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert len(sides) == 11
    assert not any(side.requires_grad for side in sides)
    with torch.no_grad():
        assert torch.equal(held(sides, module, x), plain)


def test_difference_is_of_the_smooth_piece(network):
    module, x = network
    theta = dict(module.named_parameters())
    w = {name: torch.randn_like(p) * p.detach().norm() / p.numel() ** 0.5 for name, p in theta.items()}
    _, tangent = torch.func.jvp(lambda p: functional_call(module, p, (x,)), (theta,), (w,))
    _, sides = recorded(module, x)

    def error(epsilon, hold):
        at = {name: p.detach() + epsilon * w[name] for name, p in theta.items()}
        with torch.no_grad():
            ahead = held(sides, functional_call, module, at, (x,)) if hold else functional_call(module, at, (x,))
            return (((ahead - module(x)) / epsilon - tangent).norm() / tangent.norm()).item()

    assert error(1e-6, hold=True) < 1e-5
    assert error(1e-3, hold=True) < 0.2 * error(1e-3, hold=False)
    assert error(1e-4, hold=True) == pytest.approx(error(1e-3, hold=True) / 10, rel=0.2)  # of first order


@pytest.mark.parametrize("change", ["fewer", "more", "another size"])
def test_another_path_is_an_error(change):
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()]
    x = torch.randn(5, 4)
    _, sides = recorded(nn.Sequential(*layers), x)
    other = {"fewer": layers[:2], "more": [*layers, nn.ReLU()], "another size": layers}[change]
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"takes another path .* expected .*, got"):
        held(sides, nn.Sequential(*other), x[:3] if change == "another size" else x)


def test_compiled_code_is_not_seen():
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert visible(module)
    module[0].compile()
    assert not visible(module)
    assert not visible(nn.Sequential(torch.compile(nn.Linear(2, 2))))

"""How an update depends on the gradient, against the optimizers themselves and against autograd."""

import pytest
import torch
from torch.optim import SGD, Adam, AdamW

from kdfast.meta.inner import check_optimizer, functional_step, update_slopes

OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "weight decay": lambda p: SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "dampening": lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.4),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "tensor lr": lambda p: SGD(p, lr=torch.tensor(0.1), momentum=0.9),
    "adam": lambda p: Adam(p, lr=0.1, betas=(0.8, 0.95), weight_decay=0.1),  # the decay goes through the moments
    "adamw": lambda p: AdamW(p, lr=0.1, eps=1e-3, weight_decay=0.1),
    "groups": lambda p: SGD([{"params": p[:1], "lr": 0.3, "momentum": 0.5}, {"params": p[1:]}], lr=0.1, nesterov=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 2])  # an empty state has its own first step
def test_step_and_slopes(name, steps_before, double):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    optimizer = OPTIMIZERS[name](parameters)
    for _ in range(steps_before):
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()

    theta = [p.detach().clone() for p in parameters]
    gradients = [torch.randn_like(p).requires_grad_() for p in parameters]
    slopes = update_slopes(optimizer, parameters, gradients)
    stepped = functional_step(optimizer, parameters, theta, gradients)
    with torch.no_grad():  # another path: SGD's parameters in one sweep
        swept = functional_step(optimizer, parameters, theta, gradients)
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.detach()
    optimizer.step()
    for x, y, p in zip(stepped, swept, parameters, strict=True):
        torch.testing.assert_close(x, p.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y, p.detach(), rtol=1e-12, atol=1e-12)
    v = [torch.randn_like(p) for p in parameters]
    for x, expected in zip(
        [s * y for s, y in zip(slopes, v, strict=True)], torch.autograd.grad(stepped, gradients, v), strict=False
    ):
        torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-12)


def test_parameter_without_gradient_stays():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = SGD([p], lr=0.1, weight_decay=0.1)
    theta = p.detach().clone()
    assert functional_step(optimizer, [p], [theta], [None])[0] is theta
    with torch.no_grad():
        assert functional_step(optimizer, [p], [theta], [None])[0] is theta
    assert update_slopes(optimizer, [p], [None]) == [None]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_slope_is_zero_where_adam_saw_no_gradient(decay):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Adam([p], lr=0.1, weight_decay=decay)
    p.grad = torch.tensor([0.0, 2.0])
    optimizer.step()
    slope = update_slopes(optimizer, [p], [torch.tensor([0.0, 1.0])])[0]
    assert slope[0] == 0
    assert slope[1] < 0


def test_unsupported_optimizers_are_named():
    p = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=r"SGD, Adam and AdamW, got torch.optim.*RMSprop; use one of these"):
        check_optimizer(torch.optim.RMSprop(p))
    with pytest.raises(ValueError, match=r"not defined here for AdamW\(amsgrad=True\); set amsgrad=False"):
        check_optimizer(AdamW(p, amsgrad=True))
    with pytest.raises(ValueError, match=r"SGD\(maximize=True\)"):
        check_optimizer(SGD(p, lr=0.1, maximize=True))

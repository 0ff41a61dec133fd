"""The student's optimizer as a function of the gradient: where its step leads, and how that depends on g.

The meta-gradient needs (d theta+ / d g)^T v, one number an element because the usual optimizers work
element by element. With the state before the step (momentum m, second moment u, step count t):

    SGD      theta+ = theta - lr d             d theta+/dg = -lr * (1 | 1 - dampening | 1 + momentum)
             d = g, the momentum buffer, or Nesterov's g + momentum * buffer
    Adam(W)  theta+ = theta - lr m1 / (c1 D)   d theta+/dg = -lr [(1 - b1) / (c1 D)
             D = sqrt(u1 / c2) + eps                              - m1 (1 - b2) g / (c1 c2 D^2 sqrt(u1 / c2))]
             c1 = 1 - b1^t,  c2 = 1 - b2^t

Weight decay shifts theta+ and leaves the derivative alone. On Adam's very first step the two terms
cancel to eps / D^2: the step is lr * sign(g), which no meta-parameter can change, so that one
meta-gradient is rounding noise. And where g is exactly zero, as for a dead unit or an embedding that
the batch does not use, it is so for all phi; the formula's lr / eps there multiplies a zero, but as part
of a finite displacement would drown the rest, so the derivative is given as zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from kdfast.ops.virtual_step import virtual_step

SUPPORTED = (SGD, Adam, AdamW)


def check_optimizer(optimizer: Optimizer) -> None:
    """Raises ValueError for an optimizer whose update rule is not known here."""
    kind = type(optimizer)
    if kind not in SUPPORTED:
        raise ValueError(
            "The meta-gradient needs to know how an update depends on the gradient, which it does for torch.optim's "
            f"SGD, Adam and AdamW, got {kind.__module__}.{kind.__qualname__}; use one of these for the student."
        )
    for option in ("maximize", "amsgrad"):
        if any(group.get(option) for group in optimizer.param_groups):
            raise ValueError(
                f"The meta-gradient is not defined here for {kind.__name__}({option}=True); set {option}=False."
            )


def functional_step(
    optimizer: Optimizer,
    parameters: Sequence[Tensor],  # the optimizer's own, as keys
    values: Sequence[Tensor],  # theta, shaped like the parameters
    gradients: Sequence[Tensor | None],  # shaped like the parameters
) -> list[Tensor]:  # theta+
    """Where `optimizer.step()` would lead, out of place and differentiable; the optimizer is only read.

    A parameter whose gradient is None stays where it is, as in PyTorch. Under torch.no_grad() SGD steps all
    parameters of a group in one sweep.
    """
    groups = _groups(optimizer)
    if isinstance(optimizer, SGD) and not torch.is_grad_enabled():
        return _sgd_steps(groups, optimizer.state, parameters, values, gradients)
    return [
        theta if g is None else _rule(optimizer)[0](groups[id(p)], optimizer.state.get(p, {}), theta, g)
        for p, theta, g in zip(parameters, values, gradients, strict=True)
    ]


@torch.no_grad()
def update_slopes(
    optimizer: Optimizer,
    parameters: Sequence[Tensor],  # the optimizer's own
    gradients: Sequence[Tensor | None],  # shaped like the parameters
) -> list[float | Tensor | None]:
    """The diagonal of d theta+/dg: a number for SGD, a tensor like the parameter for Adam, None without gradient.

    To be called before `optimizer.step()`, on which the state moves on.
    """
    groups = _groups(optimizer)
    if any(g is not None and g.layout is not torch.strided for g in gradients):
        raise ValueError(
            "The meta-gradient needs dense gradients, got a sparse one; build the embedding with sparse=False."
        )
    return [
        None if g is None else _rule(optimizer)[1](groups[id(p)], optimizer.state.get(p, {}), p, g)
        for p, g in zip(parameters, gradients, strict=True)
    ]


def _groups(optimizer: Optimizer) -> dict[int, dict]:
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def _rule(optimizer: Optimizer):
    return (_sgd_step, _sgd_slope) if isinstance(optimizer, SGD) else (_adam_step, _adam_slope)


def _sgd_step(group: dict, state: dict, theta: Tensor, g: Tensor) -> Tensor:
    momentum, buffer = group["momentum"], state.get("momentum_buffer")
    d = g + group["weight_decay"] * theta
    if momentum:
        buffer = d if buffer is None else momentum * buffer + (1 - group["dampening"]) * d
        d = d + momentum * buffer if group["nesterov"] else buffer
    return theta - group["lr"] * d


def _sgd_steps(groups: dict, state: dict, parameters, values, gradients) -> list[Tensor]:
    """`_sgd_step` of many parameters, those of equal constants together."""
    stepped, together = list(values), {}
    for i, (p, g) in enumerate(zip(parameters, gradients, strict=True)):
        if g is None:
            continue
        group, buffer = groups[id(p)], state.get(p, {}).get("momentum_buffer")
        if isinstance(group["lr"], Tensor):  # on a GPU a number would have to be waited for
            stepped[i] = _sgd_step(group, state.get(p, {}), values[i], g)
        else:
            together.setdefault((id(group), buffer is None), (group, []))[1].append((i, g, buffer))
    for (_, first), (group, members) in together.items():
        at, g, buffers = zip(*members, strict=True)
        constants = [group[name] for name in ("lr", "weight_decay", "momentum", "dampening", "nesterov")]
        for i, x in zip(
            at, virtual_step([values[i] for i in at], g, [] if first else buffers, *constants), strict=True
        ):
            stepped[i] = x
    return stepped


def _sgd_slope(group: dict, state: dict, theta: Tensor, g: Tensor) -> float:
    slope = 1.0
    if group["momentum"]:
        if state.get("momentum_buffer") is not None:  # PyTorch does not dampen the first step
            slope = 1 - group["dampening"]
        if group["nesterov"]:
            slope = 1 + group["momentum"] * slope
    return -group["lr"] * slope


def _adam_step(group: dict, state: dict, theta: Tensor, g: Tensor) -> Tensor:
    if group["weight_decay"] and group.get("decoupled_weight_decay"):
        theta, decayed = theta * (1 - group["lr"] * group["weight_decay"]), g
    else:
        decayed = g + group["weight_decay"] * theta
    m1, root, c1, _ = _adam_moments(group, state, decayed)
    return theta - group["lr"] / c1 * m1 / (root + group["eps"])


def _adam_slope(group: dict, state: dict, theta: Tensor, g: Tensor) -> Tensor:
    absent = g == 0
    if group["weight_decay"] and not group.get("decoupled_weight_decay"):
        g = g + group["weight_decay"] * theta
    m1, root, c1, c2 = _adam_moments(group, state, g)
    (b1, b2), denominator = group["betas"], root + group["eps"]
    root_slope = (1 - b2) * g / (c2 * root)
    slope = -group["lr"] / c1 * ((1 - b1) - m1 * root_slope / denominator) / denominator
    return slope.masked_fill_(absent, 0.0)


def _adam_moments(group: dict, state: dict, g: Tensor):
    """The first moment and the root of the corrected second moment after the step, and both corrections."""
    b1, b2 = group["betas"]
    step = state.get("step", 0)
    if isinstance(step, Tensor):  # on a GPU (fused, capturable) it stays there; fp32 would cost digits of 1 - b2^t
        step = step.item() if step.is_cpu else step.double()
    c1, c2 = 1 - b1 ** (step + 1), 1 - b2 ** (step + 1)
    m1, u1 = (1 - b1) * g, (1 - b2) * g * g
    if state:
        m1, u1 = b1 * state["exp_avg"] + m1, b2 * state["exp_avg_sq"] + u1
    positive = u1 > 0  # the root has no derivative at zero
    root = torch.where(positive, torch.where(positive, u1 / c2, 1.0).sqrt(), 0.0)
    return m1, root, c1, c2

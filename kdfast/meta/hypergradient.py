"""The gradient of the validation loss in the meta-parameters, through one step of the student.

    theta+ = step(theta, g),   g = dL(theta, phi)/dtheta,   v = dL_val(theta+)/dtheta+
    h = dL_val(theta+)/dphi = d/dphi <g(theta, phi), w>,    w = (d theta+/dg)^T v

and <g, w> is the derivative of L along w, so that h is the derivative of G = dL/dphi along w: a
difference of two G, each the gradient of the head alone at the student's outputs. The network is
never differentiated twice. docs/math/hypergradient.md derives this, the size of the displacement
and its error.

Everything here is evaluated on a `Shadow`: the live parameters, buffers and random state are read only.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kdfast.meta.inner import functional_step
from kdfast.ops.perturb import perturb

TANGENTS = ("forward", "central")

# Relative size of the displacement. Truncation grows with it, rounding falls with it; the curves are in
# docs/math/hypergradient.md. In bfloat16 a forward difference has no good size: the two meet at 25 % error.
RADIUS = {
    ("forward", "float64"): 1e-7,
    ("central", "float64"): 1e-7,
    ("forward", "float32"): 1e-3,
    ("central", "float32"): 1e-3,
    ("forward", "tf32"): 1e-2,
    ("central", "tf32"): 1e-2,
    ("central", "bfloat16"): 3e-2,
}


class _Halves(nn.Module):
    """Runs a function of the distiller as a forward, which is what functional_call can evaluate elsewhere."""

    def __init__(self, distiller: nn.Module):
        super().__init__()
        self.distiller = distiller

    def forward(self, function: Callable, *args):
        return function(self.distiller, *args)


class Shadow:
    """The distiller as it is now, to be evaluated at other parameters.

    Each evaluation has its own copy of the buffers as they were when the shadow was made, so that BatchNorm
    statistics and their counters see none of it, and every train pass starts where the real one did.

    Args:
        distiller: the module; it is read, never written.
        inner: its trainable inner parameters.
    """

    def __init__(self, distiller: nn.Module, inner: Sequence[nn.Parameter]):
        self.module = _Halves(distiller)
        names = {id(p): name for name, p in self.module.named_parameters()}
        self.names = [names[id(p)] for p in inner]
        self.buffers = {name: b.clone() for name, b in self.module.named_buffers()}
        self.devices = sorted({p.device.index for p in inner if p.is_cuda})
        self.random_state = (torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in self.devices])

    def replay(self) -> None:
        """Set the random state to the one in which the shadow was made, so that dropout drops the same units."""
        torch.set_rng_state(self.random_state[0])
        for device, state in zip(self.devices, self.random_state[1], strict=True):
            torch.cuda.set_rng_state(state, device)

    def at(self, values: Sequence[Tensor], function: Callable, *args) -> Any:
        """`function(distiller, *args)` with the inner parameters at `values` (shaped like them)."""
        tensors = {name: b.clone() for name, b in self.buffers.items()}
        tensors |= dict(zip(self.names, values, strict=True))
        return functional_call(self.module, tensors, (function, *args))


def train_parts(distiller, batch: tuple[Any, Tensor], teacher_outputs: Any) -> dict[str, Tensor]:
    """The named parts of the training loss."""
    inputs, targets = batch
    return distiller.losses(distiller.student_outputs(inputs), teacher_outputs, targets)


def validation_loss(distiller, batch: tuple[Any, Tensor]) -> Tensor:
    """What the meta-parameters are to lower."""
    inputs, targets = batch
    return distiller.validation_loss(distiller.student_outputs(inputs), targets)


def _head_loss(distiller, batch: tuple[Any, Tensor], teacher_outputs: Any) -> Tensor:
    """The training loss as a function of the meta-parameters alone."""
    inputs, targets = batch
    with torch.no_grad():
        outputs = distiller.student_outputs(inputs)
    return sum(distiller.losses(outputs, teacher_outputs, targets).values())


class Direction(NamedTuple):
    """Where the student is displaced to, and what is known there.

    Attributes:
        ahead: theta + epsilon w, all inner parameters; those which the head or the validation loss does not reach
            stay at theta, as do all where w is zero or not finite.
        behind: theta - epsilon w, if asked for.
        slope: <g, w>, the exact derivative of the training loss along w.
        epsilon: the factor on w, 0 where w is zero or not finite.
        usable: bool, whether it is neither.
    """

    ahead: list[Tensor]
    behind: list[Tensor]
    slope: Tensor
    epsilon: Tensor
    usable: Tensor


@torch.no_grad()
def direction(
    values: Sequence[Tensor],  # theta
    gradients: Sequence[Tensor | None],  # g, shaped like theta
    slopes: Sequence[float | Tensor | None],  # diagonal of d theta+/dg
    v: Sequence[Tensor | None],  # shaped like theta
    radius: float,
    both: bool = False,
) -> Direction:
    """The displacement of relative size `radius` along w = (d theta+/dg)^T v; with `both` also the one against it.

    epsilon = radius / sqrt(sum_l (|w_l| / d_l)^2), with d_l the norm of a weight tensor and sqrt(numel) for
    vectors (biases, normalisation): the displaced network is as far away whatever the weights' scale is.
    """
    moved = [i for i, (s, x) in enumerate(zip(slopes, v, strict=True)) if s is not None and x is not None]
    if not moved:
        zero = values[0].new_zeros(())
        return Direction(list(values), list(values) if both else [], zero, zero, zero > 0)
    factors = [1.0 if isinstance(slopes[i], Tensor) else slopes[i] for i in moved]
    along = [slopes[i] * v[i] if isinstance(slopes[i], Tensor) else v[i] for i in moved]
    points = perturb([values[i] for i in moved], [gradients[i] for i in moved], along, factors, radius, both)
    ahead, behind = list(values), list(values) if both else []
    for point, displaced in ((ahead, points.ahead), (behind, points.behind)):
        for i, x in zip(moved, displaced, strict=False):
            point[i] = x
    return Direction(ahead, behind, points.slope, points.epsilon, points.epsilon > 0)


class Tangent(NamedTuple):
    """The meta-gradient along a direction.

    Attributes:
        meta_gradient: h, shaped like the meta-parameters; zero where it could not be had.
        tangent_error: relative error of the same difference of the training loss, whose derivative along w is known.
        usable: bool, whether h is the meta-gradient or a zero in its place.
    """

    meta_gradient: list[Tensor]
    tangent_error: Tensor
    usable: Tensor


def tangent_of_head(
    shadow: Shadow,
    along: Direction,
    meta: Sequence[nn.Parameter],
    batch: tuple[Any, Tensor],
    teacher_outputs: Any,
    base: tuple[Tensor, Sequence[Tensor | None]] | None,
) -> Tangent:
    """The derivative of G = dL/dphi along w: forward from `base` = (L, G) at theta, or without it central, for which
    `along` has both points."""
    if along.usable.is_cpu and not along.usable:  # on a GPU the passes run, and their result is replaced by zero
        return _no_tangent(meta, along)

    def evaluate(point: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        shadow.replay()
        loss = shadow.at(point, _head_loss, batch, teacher_outputs)
        return loss.detach(), _gradient(loss, meta)

    loss, gradient = evaluate(along.ahead)
    if base is None:
        base, width = evaluate(along.behind), 2 * along.epsilon
    else:
        base, width = base, along.epsilon
    difference = (loss - base[0]) / width
    error = (difference - along.slope).abs() / along.slope.abs()
    h = [(a if b is None else a - b) / width for a, b in zip(gradient, base[1], strict=True)]
    usable = along.usable & torch.stack([x.isfinite().all() for x in h]).all()
    return Tangent([torch.where(usable, x, 0.0).to(p.dtype) for p, x in zip(meta, h, strict=True)], error, usable)


def _no_tangent(meta: Sequence[nn.Parameter], along: Direction) -> Tangent:
    return Tangent([torch.zeros_like(p) for p in meta], torch.full_like(along.slope, torch.nan), along.usable)


def _gradient(loss: Tensor, parameters: Sequence[Tensor], **options) -> list[Tensor]:
    """Like autograd.grad, with zeros where the loss does not depend on a parameter."""
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    return list(torch.autograd.grad(loss, parameters, materialize_grads=True, **options))


def default_radius(tangent: str, parameter: Tensor) -> float:
    """The displacement's relative size for the precision in which the student computes.

    Raises:
        ValueError: where no size is known to be accurate.
    """
    precision = _precision(parameter)
    if (tangent, precision) not in RADIUS:
        way_out = 'tangent="central", or radius=...' if ("central", precision) in RADIUS else "radius=..."
        raise ValueError(
            f"tangent={tangent!r} has no accurate default displacement in {precision}; use {way_out} "
            "after a look at the report's tangent_error."
        )
    return RADIUS[tangent, precision]


def _precision(parameter: Tensor) -> str:
    device = parameter.device.type
    dtype = parameter.dtype
    if torch.is_autocast_enabled(device) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(device)
    rounded = (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    if dtype == torch.float32 and device == "cuda" and "tf32" in rounded:
        return "tf32"
    return str(dtype).removeprefix("torch.")


def exact_hypergradient(
    distiller,
    train_batch: tuple[Any, Tensor],
    validation_batch: tuple[Any, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    teacher_outputs: Any = None,
) -> list[Tensor]:
    """The meta-gradient by differentiating the whole step twice: the oracle, slow and memory-hungry.

    Nothing is changed: not the distiller, its buffers, the optimizer or the random state. In float64 it is exact
    to rounding, and is what a new head should be tested against before it is trained with `meta_kd_step`.

    Args:
        distiller: as for `kdfast.meta_kd_step`; every operation in it must be twice differentiable.
        train_batch: (inputs, targets).
        validation_batch: (inputs, targets).
        optimizer: SGD, Adam or AdamW of the inner parameters, in the state before the step.
        teacher_outputs: of the train inputs, where they are at hand.

    Returns:
        dL_val(theta+)/dphi, shaped like `distiller.meta_parameters()`.

    Example:
        >>> h = exact_hypergradient(distiller.double(), train_batch, validation_batch, optimizer)
    """
    inner = [p for p in distiller.inner_parameters() if p.requires_grad]
    meta = [p for p in distiller.meta_parameters() if p.requires_grad]
    if teacher_outputs is None:
        teacher_outputs = distiller.teacher_outputs(train_batch[0])
    shadow = Shadow(distiller, inner)
    with torch.random.fork_rng(shadow.devices):
        theta = [p.detach().clone().requires_grad_() for p in inner]
        loss = sum(shadow.at(theta, train_parts, train_batch, teacher_outputs).values())
        gradients = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True)
        stepped = functional_step(optimizer, inner, theta, gradients)
        return _gradient(shadow.at(stepped, validation_loss, validation_batch), meta)

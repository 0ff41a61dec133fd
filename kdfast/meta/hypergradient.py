"""The gradient of the validation loss in the meta-parameters, through one step of the student.

    theta+ = step(theta, g),   g = dL(theta, phi)/dtheta,   v = dL_val(theta+)/dtheta+
    h = dL_val(theta+)/dphi = d/dphi <g(theta, phi), w>,    w = (d theta+/dg)^T v

and <g, w> is the derivative D of L along w: with the student's tangent f_dot along w, D = <dL/df, f_dot> is a
derivative of the head alone, and h that of D in phi. The network is never differentiated twice.
docs/math/hypergradient.md derives this, the size of the displacement and its error.

Everything here is evaluated on a `Shadow`: the live parameters, buffers and random state are read only.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from kdfast.meta import processes, tangents
from kdfast.meta.inner import functional_step
from kdfast.meta.shadow import Shadow
from kdfast.meta.tangents import Batch, TrainPass
from kdfast.ops.perturb import perturb

DIFFERENCES = ("forward", "central")
TANGENTS = (*DIFFERENCES, "jvp", "exact")

# Relative size of the displacement. Truncation grows with it, rounding falls with it; the curves are in
# docs/math/hypergradient.md.
RADIUS = {
    ("forward", "float64"): 1e-7,
    ("central", "float64"): 1e-5,
    ("forward", "float32"): 2e-4,
    ("central", "float32"): 3e-3,
    ("forward", "tf32"): 1e-2,
    ("central", "tf32"): 3e-2,
    ("central", "float16"): 3e-2,
    ("central", "bfloat16"): 6e-2,
}
# Where units may switch between the two points (compiled code, kdfast/meta/kinks.py), truncation is larger.
RADIUS_SWITCHING = RADIUS | {
    ("central", "float64"): 1e-6,
    ("forward", "float32"): 1e-4,
    ("central", "float32"): 1e-4,
    ("central", "tf32"): 1e-2,
    ("central", "float16"): 1e-2,
}


def validation_loss(distiller, batch: Batch) -> Tensor:
    """What the meta-parameters are to lower."""
    inputs, targets = batch
    return distiller.validation_loss(distiller.student_outputs(inputs), targets)


class Clip(NamedTuple):
    """A gradient's clipping by its norm: factor = min(1, bound / (norm + 1e-6)), as PyTorch has it."""

    norm: Tensor
    factor: Tensor


def clip(gradients: Sequence[Tensor | None], bound: float) -> Clip:
    norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
    return Clip(norm, (bound / (norm + 1e-6)).clamp(max=1.0))


class Taken(NamedTuple):
    """A step of the student, and what the meta-gradient through it needs.

    Attributes:
        shadow: made before the step.
        passes: its training passes, one a batch.
        theta: the inner parameters before it.
        gradients: g as the optimizer got it, shaped like theta.
        slopes: the diagonal of d theta+/dg.
        factor: what each pass's loss was multiplied by before its backward pass.
        clip: how g was clipped, or None.
    """

    shadow: Shadow
    passes: list[TrainPass]
    theta: list[Tensor]
    gradients: list[Tensor | None]
    slopes: list[float | Tensor | None]
    factor: float | Tensor
    clip: Clip | None


class Direction(NamedTuple):
    """Where the student is displaced to, and what is known there.

    Attributes:
        ahead: theta + epsilon w, all inner parameters; those which the head or the validation loss does not reach
            stay at theta, as do all where w is zero or not finite.
        behind: theta - epsilon w, if asked for.
        w: shaped like theta, None where nothing moves.
        slope: <g, w>, the exact derivative of the training loss along w.
        size: what an error of the slope is relative to: its own, or what clipping took away of it.
        epsilon: the factor on w, 0 where w is zero or not finite.
        usable: bool, whether it is neither.
    """

    ahead: list[Tensor]
    behind: list[Tensor] | None
    w: list[Tensor | None]
    slope: Tensor
    size: Tensor
    epsilon: Tensor
    usable: Tensor


@torch.no_grad()
def direction(
    values: Sequence[Tensor],  # theta
    gradients: Sequence[Tensor | None],  # g as the optimizer got it, shaped like theta
    slopes: Sequence[float | Tensor | None],  # diagonal of d theta+/dg
    v: Sequence[Tensor | None],  # shaped like theta
    radius: float,
    both: bool = False,
    clipped: Clip | None = None,
) -> Direction:
    """The displacement of relative size `radius` along w = (d theta+/dg)^T v; with `both` also the one against it.

    epsilon = radius / sqrt(sum_l (|w_l| / d_l)^2), with d_l the norm of a weight tensor and sqrt(numel) for
    vectors (biases, normalisation): the displaced network is as far away whatever the weights' scale is.
    """
    w = [None if s is None or x is None else s * x for s, x in zip(slopes, v, strict=True)]
    size = None
    if clipped is not None:
        w, size = _through_clip(w, gradients, clipped)
    moved = [i for i, x in enumerate(w) if x is not None]
    if not moved:
        zero = values[0].new_zeros(())
        return Direction(list(values), list(values) if both else None, w, zero, zero, zero, zero > 0)
    at, g, along = ([x[i] for i in moved] for x in (values, gradients, w))
    points = perturb(at, g, along, [1.0] * len(moved), radius, both)
    ahead, behind = list(values), list(values) if both else None
    for point, displaced in ((ahead, points.ahead), (behind, points.behind)):
        for i, x in zip(moved, displaced, strict=False):
            point[i] = x
    slope = points.slope if clipped is None else points.slope / clipped.factor  # of g before it was clipped
    size = (slope if size is None else size).abs()
    return Direction(ahead, behind, w, slope, size, points.epsilon, (points.epsilon > 0) & slope.isfinite())


def _through_clip(w, gradients, clipped: Clip) -> tuple[list[Tensor | None], Tensor]:
    """The transpose of the clipping's derivative: c w - g <g, w> c / (|g| (|g| + 1e-6)) where it clipped; and <g, c w>.

    It couples all parameters through their norm: those which the validation loss does not reach move too. What is left
    is all but orthogonal to g.
    """
    norm, factor = clipped
    dot = sum((g * x).sum() for g, x in zip(gradients, w, strict=True) if x is not None)  # of the clipped g
    pull = torch.where(factor < 1, dot / (factor * norm * (norm + 1e-6)), 0.0)
    through = [
        None if g is None else (-pull * g if x is None else factor * x - pull * g)
        for g, x in zip(gradients, w, strict=True)
    ]
    return through, dot


class Hypergradient(NamedTuple):
    """The meta-gradient of a step.

    Attributes:
        values: h, shaped like the meta-parameters; zero where it could not be had.
        tangent_error: relative error of D, which is known, with the tangent that h was made of.
        epsilon: factor of the displacement along w.
        usable: bool, whether h is the meta-gradient or a zero in its place; False where the loss has no phi in it.
    """

    values: list[Tensor]
    tangent_error: Tensor
    epsilon: Tensor
    usable: Tensor


def hypergradient(
    taken: Taken,
    v: Sequence[Tensor | None],  # dL_val/dtheta+, shaped like theta
    meta: Sequence[nn.Parameter],
    tangent: str,
    radius: float,
    fraction: float = 1.0,
) -> Hypergradient:
    """The meta-gradient of a step that was taken, averaged over the batches and the processes."""
    both = tangent == "central"
    along = direction(taken.theta, taken.gradients, taken.slopes, v, radius, both, taken.clip)
    # On a GPU, where looking would mean waiting, the passes run, and their result is replaced by zero.
    if along.usable.is_cpu and not along.usable:
        return Hypergradient([torch.zeros_like(p) for p in meta], along.slope * torch.nan, along.epsilon, along.usable)
    values, known = [torch.zeros_like(p) for p in meta], along.slope.new_zeros(())
    reached = torch.zeros_like(known)  # by how many passes any meta-parameter was
    for kept in taken.passes:
        h, d = _of_pass(taken, kept, along, meta, tangent, fraction)
        if found := [(value, x) for value, x in zip(values, h, strict=True) if x is not None]:
            torch._foreach_add_(*map(list, zip(*found, strict=True)), alpha=1 / len(taken.passes))
            reached += 1
        known += d.detach() / len(taken.passes)
    *values, known, reached = processes.average([*values, known, reached], [*meta, known, reached])
    error = (known - along.slope).abs() / along.size
    usable = along.usable & (reached > 0) & torch.stack([x.isfinite().all() for x in values]).all()
    values = [torch.where(usable, x, 0.0).to(p.dtype) for p, x in zip(meta, values, strict=True)]
    return Hypergradient(values, error, along.epsilon, usable)


def _of_pass(taken: Taken, kept: TrainPass, along: Direction, meta, tangent: str, fraction: float):
    """(h, D) of one training pass; None in h where the loss has no such meta-parameter in it."""
    shadow, theta = taken.shadow, taken.theta
    part = kept if fraction == 1 else tangents.part_of(kept, fraction)
    if tangent == "exact":
        return _by_double_backward(shadow, part, theta, along.w, meta)
    if tangent == "jvp":
        part.outputs, moved = tangents.jvp(shadow, part, theta, along.w)
        width, w = 1.0, along.w
    else:
        if part is not kept:
            tangents.begin_part(shadow, part, theta)
        moved = tangents.difference(shadow, part, along.ahead, along.behind)
        width = along.epsilon * (1 if along.behind is None else 2)
        w = [None if x is None else x * width for x in along.w]
    # A recorded slope knows nothing of the head's own parameters, which a clipped gradient moves.
    if kept.slope is None or taken.clip is not None:
        d = known = tangents.loss_along(shadow, part, theta, w, moved)
    else:
        if part is not kept:
            moved = tangents.for_all_rows(moved, kept)
        general = lambda: tangents.loss_along(shadow, kept, theta, w, moved)  # noqa: E731
        d = kept.slope(tangents.as_outputs(kept, moved), taken.factor, general)
        known = tangents.slope_of(kept, moved, taken.factor)
    h = shadow.again(theta, lambda _: gradient_of(d, meta))
    return [None if x is None else x / width for x in h], known / width


def _by_double_backward(shadow: Shadow, kept: TrainPass, theta, w, meta):
    """(h, D) with <g, w> differentiated through g."""
    kept.start.replay()
    at = [x.detach().requires_grad_() for x in theta]

    def differentiated(distiller):
        loss = sum(train_parts(distiller, kept.batch, kept.teacher_outputs).values())
        gradients = torch.autograd.grad(loss, at, create_graph=True, allow_unused=True)
        pairs = [(g, x) for g, x in zip(gradients, w, strict=True) if g is not None and x is not None]
        slope = sum((g * x).sum() for g, x in pairs)
        return gradient_of(slope, meta), slope

    return shadow.at(at, differentiated)


def train_parts(distiller, batch: Batch, teacher_outputs: Any) -> dict[str, Tensor]:
    """The named parts of the training loss."""
    inputs, targets = batch
    return distiller.losses(distiller.student_outputs(inputs), teacher_outputs, targets)


def gradient_of(value: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """Like autograd.grad, with None where the value does not depend on a parameter, be it on none."""
    if not value.requires_grad:
        return [None] * len(parameters)
    return list(torch.autograd.grad(value, parameters, allow_unused=True))


def sixteen_bits(parameters: Sequence[Tensor], passes: Sequence[TrainPass]) -> torch.dtype | None:
    """The 16-bit type in which a part of the student computed: some parameters', an output's, or, where its functions
    could be seen, one of an autocast inside the student."""
    found = {p.dtype for p in parameters}
    for kept in passes:
        found |= {x.dtype for x in tree_leaves(kept.outputs) if isinstance(x, Tensor)}
        found |= set() if kept.path is None else {kept.path.sixteen}
    return next((x for x in (torch.bfloat16, torch.float16) if x in found), None)


def default_tangent(parameter: Tensor, sixteen: torch.dtype | None = None) -> str:
    """The cheapest whose error is known to be small in the precision in which the student computes."""
    return "forward" if ("forward", _precision(parameter, sixteen)) in RADIUS else "central"


def default_radius(tangent: str, parameter: Tensor, held: bool = True, sixteen: torch.dtype | None = None) -> float:
    """The displacement's relative size for the precision in which the student computes, its units held or not.

    Args:
        tangent: one of TANGENTS.
        parameter: of the student.
        held: whether its units are.
        sixteen: see `sixteen_bits`.

    Raises:
        ValueError: where no size is known to be accurate.
    """
    if tangent in ("jvp", "exact"):
        return 1.0  # nothing is displaced
    precision = _precision(parameter, sixteen)
    if (tangent, precision) not in RADIUS:
        way_out = 'tangent="central", or radius=...' if ("central", precision) in RADIUS else "radius=..."
        raise ValueError(
            f"tangent={tangent!r} has no accurate default displacement in {precision}; use {way_out} "
            "after a look at the report's tangent_error."
        )
    return (RADIUS if held else RADIUS_SWITCHING)[tangent, precision]


def _precision(parameter: Tensor, sixteen: torch.dtype | None) -> str:
    device = parameter.device.type
    dtype = parameter.dtype if sixteen is None else sixteen
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
    theta = [p.detach().clone().requires_grad_() for p in inner]

    # Each backward pass is taken where its forward pass was: what is checkpointed runs again there.
    def step(distiller):
        loss = sum(train_parts(distiller, train_batch, teacher_outputs).values())
        gradients = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True)
        return functional_step(optimizer, inner, theta, gradients)

    def validated(distiller):
        loss = validation_loss(distiller, validation_batch)
        return torch.autograd.grad(loss, [*at, *meta], allow_unused=True)

    with torch.random.fork_rng(shadow.devices):
        stepped = shadow.at(theta, step)
        at = [x.detach().requires_grad_() for x in stepped]
        gradients = shadow.at(at, validated)
        v, direct = gradients[: len(at)], gradients[len(at) :]
        along = sum((x * y).sum() for x, y in zip(stepped, v, strict=True) if y is not None)
        through = shadow.again(theta, lambda _: gradient_of(torch.as_tensor(along), meta))
    return [
        sum((x for x in terms if x is not None), torch.zeros_like(p))
        for p, *terms in zip(meta, through, direct, strict=True)
    ]

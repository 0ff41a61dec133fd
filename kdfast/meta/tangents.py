"""The student's tangent along a direction, and the head's exact derivative along it.

    f_dot = d f(theta + e w) / de          of the student's outputs f, by a difference or in forward mode
    D     = <dL/df (f, phi), f_dot>        the training loss along it: the head's, exact
    h     = dD / dphi                      the meta-gradient

The difference is taken of the outputs, not of dL/dphi: what is rounded in f averages out over a map's elements, and
the head's own curvature adds no error. docs/math/hypergradient.md has the curves of both.

D comes from a second pass through `losses` and back, differentiated once more in phi, or from what the backward pass
of the training loss has in passing, where the method knows how (`Distiller.losses_and_slope`). Not in forward mode:
what PyTorch has there for BatchNorm it differentiates wrongly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from kdfast.meta import checks
from kdfast.meta.kinks import ConstantsStay, Path, held, recorded
from kdfast.meta.shadow import RandomState, Shadow

Batch = tuple[Any, Any]  # inputs, targets


@dataclass
class TrainPass:
    """One batch's training pass at theta, and what is kept of it.

    Attributes:
        batch, teacher_outputs: of the head.
        outputs: the student's, detached.
        start, head: random states at the beginning of the student's forward and of the head's.
        path: which the student took (kdfast/meta/kinks.py), where a difference is to be taken along the same.
        moving: of each of the outputs' leaves, whether it has a gradient; the others are constants.
        slope: see `Distiller.losses_and_slope`; None where the method has none.
        gradients: dL/df of each of the outputs' tensors, by their place, once the backward pass has run.
    """

    batch: Batch
    teacher_outputs: Any
    outputs: Any
    start: RandomState
    head: RandomState
    path: Path | None = None
    moving: list[bool] = field(default_factory=list)
    slope: Callable | None = None
    gradients: dict[int, Tensor] = field(default_factory=dict)


class StudentPass(NamedTuple):
    """The student's outputs, part of a graph, and what `TrainPass` keeps of where they come from."""

    outputs: Any
    start: RandomState
    path: Path | None


def student_pass(distiller, inputs: Any, devices, kinks: bool = False) -> StudentPass:
    """The student's forward pass; with `kinks` its path is kept."""
    start, path = RandomState(devices), None
    with checks.unchanged("The student", "inputs", inputs):
        if kinks:
            outputs, path = recorded(distiller.student_outputs, inputs)
        else:
            outputs = distiller.student_outputs(inputs)
    return StudentPass(outputs, start, path)


def head_pass(distiller, passed: StudentPass, batch: Batch, teacher_outputs: Any, devices):
    """(the named parts of the training loss, the `TrainPass`)."""
    outputs, start, path = passed
    leaves, structure = tree_flatten(outputs)
    checks.outputs(leaves)
    moving = [_differentiable(x) for x in leaves]
    kept = TrainPass(batch, teacher_outputs, tree_map(_kept, outputs), start, RandomState(devices), path, moving)
    # Aliases: a feature's own gradient would hold the deeper layers' part as well.
    leaves = [_observed(x, kept.gradients, i) if moving[i] else x for i, x in enumerate(leaves)]
    outputs = tree_unflatten(leaves, structure)
    with checks.unchanged("The head", "outputs, teacher outputs or targets", (kept.outputs, teacher_outputs, batch[1])):
        parts, kept.slope = distiller.losses_and_slope(outputs, teacher_outputs, batch[1])
    return parts, kept


def train_pass(
    distiller, batch: Batch, teacher_outputs: Any, devices, kinks: bool = False
) -> tuple[dict[str, Tensor], TrainPass]:
    """The student's forward pass and the head's."""
    return head_pass(distiller, student_pass(distiller, batch[0], devices, kinks), batch, teacher_outputs, devices)


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _kept(x: Any) -> Any:
    """Detached, and a copy where it may be a parameter or buffer itself, which the step will change."""
    if isinstance(x, Tensor) and (x._base if x._is_view() else x).is_leaf:
        return x.detach().clone()
    return _detached(x)


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad


def _observed(x: Tensor, gradients: dict[int, Tensor], place: int) -> Tensor:
    alias = x.view_as(x)
    alias.register_hook(lambda gradient: gradients.__setitem__(place, gradient))
    return alias


# ---------------------------------------------------------------- the student's tangent
def difference(
    shadow: Shadow, kept: TrainPass, ahead: Sequence[Tensor], behind: Sequence[Tensor] | None
) -> list[Tensor | None]:
    """f(ahead) - f(behind) of each of the outputs' tensors, in the accumulating type, None of a constant; without
    `behind` from f(theta), which the training pass has."""
    here = _leaves(evaluated(shadow, kept, ahead))
    there = _leaves(kept.outputs if behind is None else evaluated(shadow, kept, behind))
    return [_wide(a) - _wide(b) if m else None for m, a, b in zip(kept.moving, here, there, strict=True)]


@torch.no_grad()
def evaluated(shadow: Shadow, kept: TrainPass, values: Sequence[Tensor]) -> Any:
    """The student's outputs for the pass's batch at other parameters, with the pass's own random numbers, on the pass's
    path where that was kept."""
    kept.start.replay()
    evaluate = lambda: shadow.at(values, lambda distiller: distiller.student_outputs(kept.batch[0]))  # noqa: E731
    return evaluate() if kept.path is None else tree_map(_detached, held(kept.path, evaluate))


@torch.no_grad()
def begin_part(shadow: Shadow, kept: TrainPass, theta: Sequence[Tensor]) -> None:
    """Give a `part_of` a pass its own outputs at theta."""
    kept.start.replay()
    again = shadow.at(theta, student_pass, kept.batch[0], shadow.devices, kept.path is not None)
    kept.outputs, kept.path = tree_map(_detached, again.outputs), again.path


@torch.enable_grad()  # of theta, which needs none: the student's own torch.no_grad() is to be told apart
def jvp(
    shadow: Shadow, kept: TrainPass, theta: Sequence[Tensor], w: Sequence[Tensor | None]
) -> tuple[Any, list[Tensor | None]]:
    """The outputs at theta and their tangents in forward mode, exact, in the parameters' own precision."""
    kept.start.replay()
    device = theta[0].device.type
    with torch.autocast(device, enabled=False), forward_ad.dual_level(), ConstantsStay():
        duals = [x if t is None else forward_ad.make_dual(x, t) for x, t in zip(theta, w, strict=True)]
        outputs = shadow.at(duals, lambda distiller: distiller.student_outputs(kept.batch[0]))
        pairs = [forward_ad.unpack_dual(x) if _is_float(x) else None for x in _leaves(outputs)]
        tangents = [None if pair is None else pair.tangent for pair in pairs]
        primal = tree_map(lambda x: forward_ad.unpack_dual(x).primal if _is_float(x) else x, outputs)
    return primal, [
        None if not m else torch.zeros_like(x) if t is None else t
        for m, x, t in zip(kept.moving, _leaves(primal), tangents, strict=True)
    ]


# ---------------------------------------------------------------- the head's derivative along it
def loss_along(
    shadow: Shadow,
    kept: TrainPass,
    theta: Sequence[Tensor],
    w: Sequence[Tensor | None],  # shaped like theta: the head's own parameters may move too
    tangents: list[Tensor | None],  # of the outputs' tensors
) -> Tensor:
    """D as a function of the meta-parameters, from the head's backward pass, in the parameters' precision."""
    kept.head.replay()
    like = theta[0].dtype
    leaves, structure = tree_flatten(kept.outputs)
    leaves = [x if t is None else _as(x, like).detach().requires_grad_() for x, t in zip(leaves, tangents, strict=True)]
    values = [x.detach() if t is None else x.detach().requires_grad_() for x, t in zip(theta, w, strict=True)]
    outputs = tree_unflatten(leaves, structure)
    teacher_outputs = tree_map(lambda x: _as(x, like) if _is_float(x) else x, kept.teacher_outputs)
    pairs = [(x, _as(t, like)) for x, t in zip([*leaves, *values], [*tangents, *w], strict=True) if t is not None]
    with torch.autocast(theta[0].device.type, enabled=False), torch.enable_grad():
        at = [x for x, _ in pairs]

        def gradients_of(distiller):
            parts = _eager(distiller.losses)(outputs, teacher_outputs, kept.batch[1])
            return torch.autograd.grad(sum(parts.values()), at, create_graph=True, allow_unused=True)

        gradients = shadow.at(values, gradients_of)
        dots = [(g * t).sum() for g, (_, t) in zip(gradients, pairs, strict=True) if g is not None]
    return sum(dots) if dots else theta[0].new_zeros(())


def _eager(function: Callable) -> Callable:
    """A function under torch.compile as it was before, since what is compiled can be differentiated once."""
    return getattr(function, "_torchdynamo_orig_callable", function)


def for_all_rows(tangents: list[Tensor | None], kept: TrainPass) -> list[Tensor | None]:
    """The tangents of a part's rows as those of the whole pass: scaled to stand for all, the other rows zero."""
    whole = []
    for x, t in zip(_leaves(kept.outputs), tangents, strict=True):
        if t is not None and t.shape != x.shape:
            rows, t = t, torch.zeros_like(x, dtype=t.dtype)
            t[: len(rows)] = rows * (len(x) / len(rows))
        whole.append(t)
    return whole


def slope_of(kept: TrainPass, tangents: list[Tensor | None], factor: float | Tensor) -> Tensor:
    """<dL/df, f_dot>, from the backward pass, whose loss was multiplied by `factor`."""
    dots = [
        (_wide(gradient) * tangents[place]).sum()
        for place, gradient in kept.gradients.items()
        if tangents[place] is not None
    ]
    return sum(dots) / factor


def as_outputs(kept: TrainPass, tangents: list[Tensor | None]) -> Any:
    """The tangents in the structure of the outputs, of a constant zeros."""
    leaves, structure = tree_flatten(kept.outputs)
    tangents = [torch.zeros_like(x) if t is None and _is_float(x) else t for x, t in zip(leaves, tangents, strict=True)]
    return tree_unflatten(tangents, structure)


def part_of(kept: TrainPass, fraction: float) -> TrainPass:
    """The pass of the batch's first share; what is not per sample stays whole. Its outputs are still to be had."""
    inputs, targets = kept.batch
    count = next(len(x) for x in _leaves(inputs) if isinstance(x, Tensor))
    share = max(1, round(fraction * count))
    cut = lambda x: x[:share] if isinstance(x, Tensor) and x.dim() and len(x) == count else x  # noqa: E731
    batch, teacher_outputs = (tree_map(cut, x) for x in ((inputs, targets), kept.teacher_outputs))
    return TrainPass(batch, teacher_outputs, None, kept.start, kept.head, kept.path, kept.moving)


def _leaves(tree: Any) -> list[Any]:
    return tree_flatten(tree)[0]


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Not rounded: only a smaller type is made wider."""
    return x.to(dtype) if _is_float(x) and torch.promote_types(x.dtype, dtype) == dtype else x

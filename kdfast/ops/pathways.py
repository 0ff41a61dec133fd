"""pathways: schema, fake, autograd. The formulas stand in kdfast/reference/pathways.py.

Three dispatcher ops over a list of feature pairs, each with CPU (C++), CUDA (C++ or Triton) and reference kernels:

    pathways                 the distances                                  reads a, b
    pathways_backward        the gradients in the students, the teachers    reads a, b; writes da, db
    pathways_value_and_grad  both, of sum_p w_p delta_p in the students,
                             a sample staying in cache (CPU)                reads a, b; writes da

The maps of a call share dtype and device, and lie contiguous or channels_last; a gradient lies as its map does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.ops._door import Form, eager_apply, form, grads_batched, in_transform
from kdfast.ops.kd_kl import LIB
from kdfast.reference.kd_kl import accumulate_dtype
from kdfast.reference.pathways import DISTANCES, RESIZES, pathways_gradient, pathways_hvp  # noqa: F401
from kdfast.reference.pathways import pathways as reference_pathways

_MAPS, _OPTIONS = "Tensor[] students, Tensor[] teachers", "Tensor? keep, int distance, int resize"
LIB.define(f"pathways({_MAPS}, {_OPTIONS}) -> Tensor distances")
LIB.define(
    f"pathways_backward(Tensor grad, {_MAPS}, {_OPTIONS}, bool student_grad, bool teacher_grad) "
    "-> (Tensor[] student_grads, Tensor[] teacher_grads)"
)
LIB.define(
    f"pathways_value_and_grad({_MAPS}, Tensor weights, {_OPTIONS}) -> (Tensor distances, Tensor[] student_grads)"
)


# ---------------------------------------------------------------- reference kernels (any device)
def _reference_backward(grad, students, teachers, keep, distance, resize, student_grad, teacher_grad):
    gradients = pathways_gradient(grad, students, teachers, keep, distance, resize)
    return tuple(
        [torch.empty_like(x).copy_(g) for g, x in zip(given, maps, strict=True)] if needed else []
        for given, maps, needed in zip(gradients, (students, teachers), (student_grad, teacher_grad), strict=True)
    )


def _reference_value_and_grad(students, teachers, weights, *options):
    distances = torch.ops.kdfast.pathways(students, teachers, *options)
    return distances, torch.ops.kdfast.pathways_backward(weights, students, teachers, *options, True, False)[0]


LIB.impl("pathways", reference_pathways, "CompositeExplicitAutograd")
LIB.impl("pathways_backward", _reference_backward, "CompositeExplicitAutograd")
LIB.impl("pathways_value_and_grad", _reference_value_and_grad, "CompositeExplicitAutograd")


# ---------------------------------------------------------------- fakes
def _fake_forward(students, *_):
    return students[0].new_empty(len(students), dtype=accumulate_dtype(students[0].dtype))


def _fake_backward(grad, students, teachers, keep, distance, resize, student_grad, teacher_grad):
    return (
        [torch.empty_like(x) for x in students] if student_grad else [],
        [torch.empty_like(x) for x in teachers] if teacher_grad else [],
    )


def _fake_value_and_grad(students, *_):
    return _fake_forward(students), [torch.empty_like(x) for x in students]


torch.library.register_fake("kdfast::pathways", _fake_forward, lib=LIB)
torch.library.register_fake("kdfast::pathways_backward", _fake_backward, lib=LIB)
torch.library.register_fake("kdfast::pathways_value_and_grad", _fake_value_and_grad, lib=LIB)


# ---------------------------------------------------------------- autograd of the bare op (compiled code)
def _op_setup(ctx, inputs, output):
    students, teachers, keep, *ctx.options = inputs
    ctx.count = len(students)
    ctx.save_for_backward(keep, *students, *teachers)
    ctx.needs = tuple(any(x.requires_grad for x in maps) for maps in (students, teachers))


def _op_backward(ctx, grad):
    keep, *maps = ctx.saved_tensors
    students, teachers = maps[: ctx.count], maps[ctx.count :]
    grads = torch.ops.kdfast.pathways_backward(grad.contiguous(), students, teachers, keep, *ctx.options, *ctx.needs)
    return *(g if g else [None] * ctx.count for g in grads), None, None, None


torch.library.register_autograd("kdfast::pathways", _op_backward, setup_context=_op_setup, lib=LIB)


# ---------------------------------------------------------------- Functions (eager code)
_FORWARD = torch.ops.kdfast.pathways.default
_BACKWARD = torch.ops.kdfast.pathways_backward.default
_VALUE_AND_GRAD = torch.ops.kdfast.pathways_value_and_grad.default


def pathways(
    students: Sequence[Tensor],  # of [batch_p, channels_p, height_p, width_p]; at least one
    teachers: Sequence[Tensor],  # as the definition has them; all maps of one dtype and device
    keep: Tensor | None,  # [pathways] bool
    distance: int,
    resize: int,
) -> Tensor:  # [pathways], of accumulate_dtype
    """The distances. Arguments are taken as checked."""
    which = form()
    if which is Form.FUNCTION:
        apply = Pathways.apply if in_transform() else _apply_distances
        return apply(keep, distance, resize, *students, *teachers)
    if which is Form.REFERENCE:
        return reference_pathways(students, teachers, keep, distance, resize)
    return _FORWARD(_dense(students), _dense(teachers), keep, distance, resize)


def weighted_sum(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    weights: Tensor,  # [pathways], of accumulate_dtype
    keep: Tensor | None,
    distance: int,
    resize: int,
) -> Tensor:  # scalar
    """sum_p weights_p * distance_p. In eager code on the CPU the students' gradients are made along with it."""
    grad_now = (
        form() is Form.FUNCTION
        and not in_transform()
        and torch.is_grad_enabled()
        and weights.is_cpu
        and any(x.requires_grad for x in students)
        and not any(x.requires_grad for x in teachers)
    )
    if grad_now:
        return _apply_weighted_sum(weights, keep, distance, resize, *students, *teachers)[0]
    return (weights * pathways(students, teachers, keep, distance, resize)).sum()


class Pathways(torch.autograd.Function):
    """The distances of the pairs (maps[p], maps[P + p])."""

    @staticmethod
    def forward(keep, distance, resize, *maps):
        with torch._C._AutoDispatchBelowAutograd():  # straight to the kernel
            return _FORWARD(*_halves(_dense(maps)), keep, distance, resize)

    @staticmethod
    def setup_context(ctx, inputs, output):
        keep, *ctx.options = inputs[:3]
        ctx.save_for_backward(keep, *inputs[3:])
        ctx.save_for_forward(keep, *inputs[3:])

    @staticmethod
    def backward(ctx, grad):
        keep, *maps = ctx.saved_tensors
        needs = _needs(ctx.needs_input_grad[3:])
        return None, None, None, *_gradients(grad, keep, ctx.options, needs, maps)

    @staticmethod
    def jvp(ctx, *tangents):
        keep, *maps = ctx.saved_tensors
        unit = torch.ones(len(maps) // 2, dtype=accumulate_dtype(maps[0].dtype), device=maps[0].device)
        return _along(unit, keep, ctx.options, maps, tangents[3:])

    @staticmethod
    def vmap(info, in_dims, keep, distance, resize, *maps):
        keep = _spread_vector(info, in_dims[0], keep, len(maps) // 2)
        out = Pathways.apply(keep, distance, resize, *_spread_maps(info, in_dims[3:], maps))
        return out.unflatten(0, (info.batch_size, -1)), 0


class WeightedSum(torch.autograd.Function):
    """The weighted sum, with the gradients in the students made in the same sweep and kept for the backward, which
    then costs nothing. For eager code outside torch.func."""

    @staticmethod
    def forward(weights, keep, distance, resize, *maps):
        students, teachers = _halves(_dense(maps))
        with torch._C._AutoDispatchBelowAutograd():
            distances, gradients = _VALUE_AND_GRAD(students, teachers, weights.contiguous(), keep, distance, resize)
        return (weights * distances).sum(), distances, *gradients

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        weights, keep, *ctx.options = inputs[:4]
        ctx.save_for_backward(weights, keep, output[1], *inputs[4:])
        ctx.save_for_forward(weights, keep, output[1], *inputs[4:])
        ctx.student_grads = output[2:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, *_):
        count = len(ctx.needs_input_grad) - 4
        if grad is None:
            return (None,) * (4 + count)
        weights, keep, distances, *maps = ctx.saved_tensors
        ready, ctx.student_grads = ctx.student_grads, None  # given away: a second backward makes its own
        if ready is not None and not (torch.is_grad_enabled() or in_transform() or grads_batched(grad)):
            if grad.item() != 1.0:  # a CPU scalar
                torch._foreach_mul_(ready, grad.item())
            d_weights = grad * distances if ctx.needs_input_grad[0] else None
            return d_weights, None, None, None, *ready, *(None,) * (count // 2)
        grads = _gradients(grad * weights, keep, ctx.options, _needs(ctx.needs_input_grad[4:]), maps)
        d_weights = grad * Pathways.apply(keep, *ctx.options, *maps) if ctx.needs_input_grad[0] else None
        return d_weights, None, None, None, *grads

    @staticmethod
    def jvp(ctx, *tangents):
        weights, keep, _, *maps = ctx.saved_tensors
        change = _along(weights, keep, ctx.options, maps, tangents[4:]).sum()
        if tangents[0] is not None:
            change = change + (tangents[0] * Pathways.apply(keep, *ctx.options, *maps)).sum()
        return change, *(None,) * (1 + len(maps) // 2)


_apply_distances = eager_apply(Pathways)
_apply_weighted_sum = eager_apply(WeightedSum)


class PathwaysBackward(torch.autograd.Function):
    """The gradients of sum(grad * distances) in the students, the teachers, or both.
    Its own derivatives are the closed-form products with the Hessian."""

    @staticmethod
    def forward(grad, keep, distance, resize, needs, *maps):
        students, teachers = _halves(_dense(maps))
        grad = grad.to(accumulate_dtype(maps[0].dtype)).contiguous()
        with torch._C._AutoDispatchBelowAutograd():
            student_grads, teacher_grads = _BACKWARD(grad, students, teachers, keep, distance, resize, *needs)
        return *student_grads, *teacher_grads

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad, keep, *ctx.options, ctx.needs = inputs[:5]
        ctx.save_for_backward(grad, keep, *inputs[5:])
        ctx.save_for_forward(grad, keep, *inputs[5:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        """Of Phi = grad * <gradient, w>: linear in grad, and elsewhere grad * H w."""
        grad, keep, *maps = ctx.saved_tensors
        w = _unpack(cotangents, ctx.needs, len(maps) // 2)
        if all(x is None for half in w for x in half):
            return (None,) * (5 + len(maps))
        unit = pathways_gradient(torch.ones_like(grad), *_halves(maps), keep, *ctx.options)
        d_grad = _dots([*unit[0], *unit[1]], [*w[0], *w[1]])
        product = pathways_hvp(grad, *_halves(maps), keep, *ctx.options, direction=w)
        d_maps = [h.to(x.dtype) for h, x in zip((*product[0], *product[1]), maps, strict=True)]
        return d_grad.to(grad.dtype), None, None, None, None, *d_maps

    @staticmethod
    def jvp(ctx, *tangents):
        grad, keep, *maps = ctx.saved_tensors
        grad_dot, direction = tangents[0], _halves(tangents[5:])
        halves = _halves(maps)
        product = pathways_hvp(grad, *halves, keep, *ctx.options, direction=direction)
        if grad_dot is not None:
            gradient = pathways_gradient(grad_dot, *halves, keep, *ctx.options)
            product = [[h + g for h, g in zip(hs, gs, strict=True)] for hs, gs in zip(product, gradient, strict=True)]
        return tuple(
            h.to(x.dtype)
            for hs, xs, needed in zip(product, halves, ctx.needs, strict=True)
            for h, x in zip(hs, xs, strict=True)
            if needed
        )

    @staticmethod
    def vmap(info, in_dims, grad, keep, distance, resize, needs, *maps):
        count = len(maps) // 2
        grad, keep = (_spread_vector(info, d, x, count) for d, x in zip(in_dims[:2], (grad, keep), strict=True))
        out = PathwaysBackward.apply(grad, keep, distance, resize, needs, *_spread_maps(info, in_dims[5:], maps))
        whole = info.batch_size * count  # gradients of a half: those of example v at [v * count, (v + 1) * count)
        stacked = tuple(
            torch.stack(out[half + p : half + whole : count])
            for half in range(0, len(out), whole)
            for p in range(count)
        )
        return stacked, (0,) * len(stacked)


def _gradients(grad, keep, options, needs, maps) -> list[Tensor | None]:
    """The gradients in all maps, None where not needed."""
    if not any(needs):
        return [None] * len(maps)
    if grads_batched(grad):  # linear in grad: one pass serves all
        unit = torch.ones(len(maps) // 2, dtype=grad.dtype, device=grad.device)
        units = _halves(_gradients(unit, keep, options, needs, maps))
        return [None if g is None else grad[p] * g for half in units for p, g in enumerate(half)]
    halves = _unpack(PathwaysBackward.apply(grad, keep, *options, needs, *maps), needs, len(maps) // 2)
    return [*halves[0], *halves[1]]


def _along(grad, keep, options, maps, tangents) -> Tensor:  # [pathways]
    """grad_p times the derivative of distance p along the tangents."""
    needs = _needs([t is not None for t in tangents])
    if not any(needs):
        return torch.zeros_like(grad)
    return _dots(_gradients(grad, keep, options, needs, maps), tangents)


def _dots(gradients, directions) -> Tensor:  # [pathways]
    """For each pathway, the inner product over its student's and its teacher's map."""
    dots = [
        None if w is None else (g.to(wide := accumulate_dtype(g.dtype)) * w.to(wide)).sum()
        for g, w in zip(gradients, directions, strict=True)
    ]
    some = next(x for x in dots if x is not None)
    dots = [torch.zeros_like(some) if x is None else x for x in dots]
    return torch.stack([s + t for s, t in zip(*_halves(dots), strict=True)])


def each_once(change, maps: Sequence[Tensor]) -> list[Tensor]:
    """`change` of each map; a tensor that stands in the list many times is changed once."""
    if torch.compiler.is_compiling():  # where common subexpressions are found anyway
        return [change(x) for x in maps]
    changed = {id(x): x for x in maps}
    changed = {key: change(x) for key, x in changed.items()}
    return [changed[id(x)] for x in maps]


def _dense(maps: Sequence[Tensor]) -> list[Tensor]:
    """The maps as kernels take them: contiguous or channels_last, copied only where they are neither."""

    def change(x):
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        return x if dense else x.contiguous()

    return each_once(change, maps)


def _halves(both):
    """(of the students, of the teachers)."""
    count = len(both) // 2
    return both[:count], both[count:]


def _needs(each) -> tuple[bool, bool]:
    students, teachers = _halves(each)
    return any(students), any(teachers)


def _unpack(given, needs, count):
    """The students' and the teachers' gradients, None where not asked for."""
    given = iter(given)
    return [[next(given) for _ in range(count)] if needed else [None] * count for needed in needs]


def _spread_maps(info, in_dims, maps) -> list[Tensor]:
    """The vmapped dimension becomes more pathways: those of the first example, then of the second, ..."""
    spread = [[x] * info.batch_size if d is None else x.unbind(d) for x, d in zip(maps, in_dims, strict=True)]
    return [x[v] for half in _halves(spread) for v in range(info.batch_size) for x in half]


def _spread_vector(info, dim, x: Tensor | None, count: int) -> Tensor | None:
    if x is None:
        return None
    x = x.expand(info.batch_size, count) if dim is None else x.movedim(dim, 0)
    return x.reshape(-1)

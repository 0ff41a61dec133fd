"""kd_kl: schema, fake, autograd. The formulas stand in kdfast/reference/kd_kl.py.

Three dispatcher ops, each with CPU (C++), CUDA (C++ or Triton) and reference kernels:

    kd_kl                 row losses and row statistics, one sweep            reads s, t
    kd_kl_backward        elementwise, given the statistics                   reads s, t; writes ds, dt
    kd_kl_value_and_grad  coefficient * sum of the losses and its gradient,
                          in one sweep, the row staying in cache (CPU)        reads s, t; writes ds
"""

import torch
from torch import Tensor

from kdfast import _native
from kdfast.ops._door import Form, eager_apply, form, grads_batched, in_forward_mode, in_transform
from kdfast.ops.kd_kl_hvp import in_memory, is_last, kd_kl_hvp
from kdfast.reference.kd_kl import STATS, Options, accumulate_dtype, kd_kl_gradient, kd_kl_stats
from kdfast.reference.kd_kl import kd_kl as reference_kd_kl

_INPUTS = (
    "Tensor student, Tensor teacher, Tensor? student_temperature, Tensor? teacher_temperature, "
    "Tensor? labels, Tensor? target, Tensor? weight"
)
_OPTIONS = (
    "float tau_s, float tau_t, float alpha, float label_smoothing, int ignore_index, int divergence, int scale, "
    "float beta, float target_weight, float softcap, float logit_scale"
)
_N = len(Options._fields)
LIB = torch.library.Library("kdfast", "FRAGMENT")
LIB.define(f"kd_kl({_INPUTS}, {_OPTIONS}, bool temperature_grad) -> (Tensor loss, Tensor stats)")
LIB.define(
    f"kd_kl_backward(Tensor grad, {_INPUTS}, Tensor stats, {_OPTIONS}, "
    "bool student_grad, bool teacher_grad) -> (Tensor, Tensor)"
)
LIB.define(
    f"kd_kl_value_and_grad({_INPUTS}, {_OPTIONS}, bool temperature_grad, float coefficient) "
    "-> (Tensor loss, Tensor stats, Tensor student_grad)"
)
# What value_and_grad made, times the incoming gradient; on CUDA without waiting to see that this is 1.
LIB.define("kd_kl_scale_(Tensor(a!) gradient, Tensor factor) -> ()")


# ---------------------------------------------------------------- reference kernels (any device)
def _reference_forward(*args):
    *inputs, temperature_grad = args
    tensors, options = inputs[:7], Options(*inputs[7:])
    return reference_kd_kl(*tensors, options), kd_kl_stats(*tensors, options, temperature_grad)


def _reference_backward(grad, *args):
    tensors, options = args[:7], Options(*args[8:-2])
    student_grad, teacher_grad = args[-2:]
    ds, dt, _, _ = kd_kl_gradient(*tensors, options)
    student, teacher = tensors[:2]
    g = grad.unsqueeze(-1)
    return (
        (g * ds).to(student.dtype) if student_grad else student.new_empty(0),
        (g * dt).to(teacher.dtype) if teacher_grad else teacher.new_empty(0),
    )


def _reference_value_and_grad(*args):
    *inputs, temperature_grad, coefficient = args
    loss, stats = torch.ops.kdfast.kd_kl(*inputs, temperature_grad)
    grad = torch.full_like(loss, coefficient)
    ds, _ = torch.ops.kdfast.kd_kl_backward(grad, *inputs[:7], stats, *inputs[7:], True, False)
    return loss.sum() * coefficient, stats, ds


def _reference_scale(gradient, factor):
    gradient.mul_(factor)


LIB.impl("kd_kl", _reference_forward, "CompositeExplicitAutograd")
LIB.impl("kd_kl_backward", _reference_backward, "CompositeExplicitAutograd")
LIB.impl("kd_kl_value_and_grad", _reference_value_and_grad, "CompositeExplicitAutograd")
LIB.impl("kd_kl_scale_", _reference_scale, "CompositeExplicitAutograd")


# ---------------------------------------------------------------- fakes
def _fake_forward(student, *args):
    loss = student.new_empty(student.shape[0], dtype=accumulate_dtype(student.dtype))
    return loss, loss.new_empty(student.shape[0], STATS)


def _fake_backward(grad, student, teacher, *args):
    student_grad, teacher_grad = args[-2:]
    return (
        student.new_empty(student.shape) if student_grad else student.new_empty(0),
        teacher.new_empty(teacher.shape) if teacher_grad else teacher.new_empty(0),
    )


def _fake_value_and_grad(student, *args):
    loss, stats = _fake_forward(student)
    return loss.new_empty(()), stats, student.new_empty(student.shape)


torch.library.register_fake("kdfast::kd_kl", _fake_forward, lib=LIB)
torch.library.register_fake("kdfast::kd_kl_backward", _fake_backward, lib=LIB)
torch.library.register_fake("kdfast::kd_kl_value_and_grad", _fake_value_and_grad, lib=LIB)


# ---------------------------------------------------------------- autograd of the bare op (compiled code)
def _op_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.options = inputs[7 : 7 + _N]


def _op_backward(ctx, grad, _grad_stats):
    *tensors, stats = ctx.saved_tensors
    need_s, need_t, need_tau_s, need_tau_t = ctx.needs_input_grad[:4]
    ds, dt = torch.ops.kdfast.kd_kl_backward(grad.contiguous(), *tensors, stats, *ctx.options, need_s, need_t)
    return (
        ds if need_s else None,
        dt if need_t else None,
        _like_temperature(grad * stats[:, 6], tensors[2]) if need_tau_s else None,
        _like_temperature(grad * stats[:, 7], tensors[3]) if need_tau_t else None,
        *(None,) * (_N + 4),
    )


torch.library.register_autograd("kdfast::kd_kl", _op_backward, setup_context=_op_setup, lib=LIB)


def _like_temperature(per_row: Tensor, temperature: Tensor) -> Tensor:
    """Row gradients, summed where one temperature served all rows."""
    return per_row if temperature.shape == per_row.shape else per_row.sum().reshape(temperature.shape)


# ---------------------------------------------------------------- Functions (eager code)
_FORWARD = torch.ops.kdfast.kd_kl.default
_BACKWARD = torch.ops.kdfast.kd_kl_backward.default
_VALUE_AND_GRAD = torch.ops.kdfast.kd_kl_value_and_grad.default


def kd_kl(
    student: Tensor,  # [rows, classes]
    teacher: Tensor,  # [rows, classes], same dtype
    student_temperature: Tensor | None,  # [1] or [rows], of accumulate_dtype
    teacher_temperature: Tensor | None,  # [1] or [rows], of accumulate_dtype
    labels: Tensor | None,  # [rows] int64
    target: Tensor | None,  # [rows, classes], of accumulate_dtype
    weight: Tensor | None,  # [rows], of accumulate_dtype
    options: Options,
    coefficient: float | None,
    fuse_backward: bool = False,
) -> Tensor:
    """Row losses [rows], or for a number `coefficient` their sum times it. Arguments are taken as checked.

    On the CPU the student's gradient is made in the forward sweep wherever that is right; on a GPU if `fuse_backward`.
    """
    tensors = (student, teacher, student_temperature, teacher_temperature, labels, target, weight)
    which = form()
    if which is Form.FUNCTION:
        if (
            coefficient is not None
            and (fuse_backward or student.is_cpu)
            and student.requires_grad
            and not teacher.requires_grad
            and torch.is_grad_enabled()
            and not in_transform()
            and not in_forward_mode()
        ):
            return KdKlNow.apply(*tensors, options, coefficient)
        apply = KdKl.apply if in_transform() else _apply
        return apply(*tensors, options, coefficient)[0]
    if which is Form.REFERENCE:
        loss = reference_kd_kl(*tensors, options)
    else:
        temperature_grad = student_temperature is not None or teacher_temperature is not None
        loss, _ = _FORWARD(*_contiguous(tensors), *options, temperature_grad)
    return loss if coefficient is None else loss.sum() * coefficient


class KdKlNow(torch.autograd.Function):
    """The sum of the losses times `coefficient`; the student's gradient is made in the same sweep and kept for the
    backward, which then costs nothing. Short, as at 128 x 10 this Python is most of the time."""

    @staticmethod
    def forward(ctx, student, teacher, tau_s, tau_t, labels, target, weight, options, coefficient):
        tensors = _contiguous((student, teacher, tau_s, tau_t, labels, target, weight))
        with torch._C._AutoDispatchBelowAutograd():  # straight to the kernel
            loss, stats, ctx.student_grad = _VALUE_AND_GRAD(
                *tensors, *options, tau_s is not None or tau_t is not None, coefficient
            )
        ctx.save_for_backward(student, teacher, tau_s, tau_t, labels, target, weight, stats)
        ctx.options, ctx.coefficient = options, coefficient
        return loss

    @staticmethod
    def backward(ctx, grad):
        ds, ctx.student_grad = ctx.student_grad, None  # given away: a second backward makes its own
        if ds is None or torch.is_grad_enabled() or grads_batched(grad):
            return _backward(ctx, grad)
        if grad.is_cpu:
            factor = grad.item()
            if factor != 1.0:
                ds.mul_(factor)
        else:  # not read: that would wait for the device
            factor = grad
            torch.ops.kdfast.kd_kl_scale_(ds, grad)
        needs = ctx.needs_input_grad
        if not (needs[2] or needs[3]):
            return ds, None, None, None, None, None, None, None, None
        *tensors, stats = ctx.saved_tensors
        taus = [stats[:, 6 + i] * (factor * ctx.coefficient) if needs[2 + i] else None for i in (0, 1)]
        return *_as_inputs([ds, None, *taus], tensors), *(None,) * 5


def _backward(ctx, grad):
    """The gradients of (student, teacher, tau_s, tau_t) by the backward kernel, and None for the other arguments."""
    *tensors, stats = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[:4])
    rows = grad if ctx.coefficient is None else (grad * ctx.coefficient).expand(stats.shape[0])
    grads = _gradients(rows, tensors, stats, ctx.options, needs)
    return *_as_inputs(grads, tensors), *(None,) * 5


def _gradients(grad, tensors, stats, options, needs) -> list[Tensor | None]:
    """KdKlBackward's, as a graph node in C++ where the call is plain (csrc/autograd/kd_kl_gradient.cpp)."""
    student, teacher, tau_s, tau_t, labels, target, weight = tensors
    if _native.autograd is not None and torch.is_grad_enabled() and tau_s is None and tau_t is None and target is None:
        found = _native.autograd.kd_kl_gradient(grad, student, teacher, labels, weight, stats, options, *needs[:2])
        if found is not None:
            return [*found, None, None]
    return _unpack(KdKlBackward.apply(grad, *tensors, stats, options, needs), needs)


def again(grad, student, teacher, labels, stats, options, coefficient):
    """The student's gradient where csrc/autograd/kd_kl.cpp, which is KdKlNow in C++, has not the one that is asked for:
    to be differentiated itself, of many cotangents, or a second time."""
    tensors = student, teacher, None, None, labels, None, None
    rows = (grad * coefficient).expand(stats.shape[0])
    return _gradients(rows, tensors, stats, Options(*options), (True, False, False, False))[0]


def second_order(grad, tensors, stats, options, needs, w, wanted) -> list[Tensor | None]:
    """The gradients of (grad, student, teacher, tau_s, tau_t) of Phi = grad * <gradient, w>: linear in grad, and
    elsewhere grad * H w.

    Args:
        needs: which of KdKlBackward's outputs there are.
        w: their cotangents, None for the others and for zeros.
        wanted: which of those five gradients are.
    """
    d_grad, options = None, Options(*options)
    if wanted[0]:
        unit = _row_gradient(torch.ones_like(grad), tensors, stats, options, needs, w)
        d_grad = sum(_row_dot(g, x) for g, x in zip(unit, w, strict=True) if x is not None).to(grad.dtype)
    product = kd_kl_hvp(*tensors[:6], _weighted(tensors[6], grad), options, direction=w, wanted=wanted[1:])
    return [d_grad, *_as_inputs(product, tensors)]


if _native.autograd is not None:
    _native.autograd.on_second_order(again)
    _native.autograd.on_third_order(second_order)


class KdKl(torch.autograd.Function):
    """Row losses, or their sum times `coefficient`, and the row statistics."""

    @staticmethod
    def forward(student, teacher, tau_s, tau_t, labels, target, weight, options, coefficient):
        tensors = _contiguous((student, teacher, tau_s, tau_t, labels, target, weight))
        with torch._C._AutoDispatchBelowAutograd():  # straight to the kernel
            loss, stats = _FORWARD(*tensors, *options, tau_s is not None or tau_t is not None)
        return (loss if coefficient is None else loss.sum() * coefficient), stats

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:7], output[1])
        ctx.save_for_forward(*inputs[:7], output[1])
        ctx.options, ctx.coefficient = inputs[7:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, _):
        return (None,) * 9 if grad is None else _backward(ctx, grad)

    @staticmethod
    def jvp(ctx, *tangents):
        *tensors, stats = ctx.saved_tensors
        given = tuple(t is not None for t in tangents[:4])
        grads = KdKlBackward.apply(torch.ones_like(stats[:, 0]), *tensors, stats, ctx.options, given)
        loss = sum(_row_dot(g, t) for g, t in zip(_unpack(grads, given), tangents[:4], strict=True) if g is not None)
        return (loss if ctx.coefficient is None else loss.sum() * ctx.coefficient), None

    @staticmethod
    def vmap(info, in_dims, *args):
        loss, stats = KdKl.apply(*_fold(info, in_dims[:7], args[:7]), args[7], None)
        loss, stats = (x.unflatten(0, (info.batch_size, -1)) for x in (loss, stats))
        return (loss if args[8] is None else loss.sum(-1) * args[8], stats), (0, 0)


_apply = eager_apply(KdKl)


class KdKlBackward(torch.autograd.Function):
    """Those gradients of sum(grad * row losses) that `needs` asks for; per row for the temperatures.
    Its own derivatives are the closed-form products with the Hessian."""

    @staticmethod
    def forward(grad, student, teacher, tau_s, tau_t, labels, target, weight, stats, options, needs):
        tensors = _contiguous((student, teacher, tau_s, tau_t, labels, target, weight))
        grad = in_memory(grad).to(stats.dtype)
        ds = dt = None
        if needs[0] or needs[1]:
            rows = grad.contiguous() if grad.is_cpu else grad  # a GPU's kernels take any stride: a launch less
            with torch._C._AutoDispatchBelowAutograd():
                ds, dt = _BACKWARD(rows, *tensors, stats, *options, needs[0], needs[1])
        taus = [grad * stats[:, 6 + i] if needs[2 + i] else None for i in (0, 1)]
        return tuple(x for x, needed in zip((ds, dt, *taus), needs, strict=True) if needed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:9])
        ctx.save_for_forward(*inputs[:9])
        ctx.options, ctx.needs = inputs[9:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        grad, *tensors, stats = ctx.saved_tensors
        w = _unpack(cotangents, ctx.needs)
        if all(x is None for x in w):
            return (None,) * 11
        found = second_order(grad, tensors, stats, ctx.options, ctx.needs, w, ctx.needs_input_grad[:5])
        return *found, *(None,) * 6

    @staticmethod
    def jvp(ctx, *tangents):
        grad, *tensors, stats = ctx.saved_tensors
        grad_dot, direction = tangents[0], tangents[1:5]
        out = [0.0] * 4
        if any(x is not None for x in direction):
            weight = _weighted(tensors[6], grad)
            out = kd_kl_hvp(*tensors[:6], weight, ctx.options, direction=direction, wanted=ctx.needs, inner=True)
        if grad_dot is not None:
            change = _row_gradient(grad_dot, tensors, stats, ctx.options, ctx.needs, inner=True)
            out = [o if g is None else g if o is None else o + g for o, g in zip(out, change, strict=True)]
        dtypes = (tensors[0].dtype, tensors[1].dtype, grad.dtype, grad.dtype)
        return tuple(o.to(d) for o, n, d in zip(out, ctx.needs, dtypes, strict=True) if n)

    @staticmethod
    def vmap(info, in_dims, *args):
        out = KdKlBackward.apply(*_fold(info, in_dims[:9], args[:9]), *args[9:])
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in out), (0,) * len(out)


def _row_gradient(factor, tensors, stats, options, needs, others=(), inner=False) -> list[Tensor | None]:
    """`factor` [rows] times those gradients of the row losses that `needs` asks for."""
    if is_last((factor, *tensors, *others), inner):
        return _unpack(KdKlBackward.apply(factor.detach(), *_detached(tensors), stats, options, needs), needs)
    unit = kd_kl_gradient(*tensors, options)
    return [g * _column(factor, g) if needed else None for g, needed in zip(unit, needs, strict=True)]


def _weighted(weight: Tensor | None, grad: Tensor) -> Tensor:
    return grad if weight is None else grad * weight


def _detached(tensors):
    return tuple(x if x is None else x.detach() for x in tensors)


def _contiguous(tensors):
    return tuple(x if x is None or x.is_contiguous() else x.contiguous() for x in tensors)


def _column(per_row: Tensor, like: Tensor) -> Tensor:
    return per_row.unsqueeze(-1) if like.dim() == 2 else per_row


def _row_dot(grad: Tensor, tangent: Tensor) -> Tensor:
    product = grad * tangent
    return product.sum(-1) if product.dim() == 2 else product


def _unpack(given, needs) -> list[Tensor | None]:
    """Puts None where nothing was asked for."""
    given = iter(given)
    return [next(given) if needed else None for needed in needs]


def _as_inputs(grads, tensors) -> list[Tensor | None]:
    """Gradients in the dtypes and shapes of (student, teacher, tau_s, tau_t)."""
    out = [None if g is None or x is None else g.to(x.dtype) for g, x in zip(grads, tensors, strict=False)]
    return [g if g is None or i < 2 else _like_temperature(g, tensors[i]) for i, g in enumerate(out)]


def _fold(info, in_dims, args) -> list[Tensor | None]:
    """The vmapped dimension folded into the rows: rows are independent, so this is the whole rule."""
    out = [
        x if x is None else x.unsqueeze(0).expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
        for x, d in zip(args, in_dims, strict=True)
    ]
    rows = max(x.shape[1] for x in out if x is not None)
    return [x if x is None else x.expand(-1, rows, *x.shape[2:]).flatten(0, 1) for x in out]

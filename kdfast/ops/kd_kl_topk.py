"""kd_kl_topk: schema, fake, autograd. The formulas stand in kdfast/reference/kd_kl_topk.py.

Two dispatcher ops, each with CPU (C++), CUDA (C++ or Triton) and reference kernels:

    kd_kl_topk            row losses and row statistics, one sweep     reads s and k log-probabilities, k indices a row
    kd_kl_topk_backward   elementwise, given the statistics            reads the same; writes ds

The teacher's side is data and has no gradient.
"""

import torch
from torch import Tensor

from kdfast.ops._door import Form, eager_apply, form, in_transform
from kdfast.ops.kd_kl import _contiguous, _fold, _like_temperature, _row_dot, _unpack
from kdfast.ops.kd_kl_hvp import in_memory
from kdfast.reference.kd_kl import accumulate_dtype
from kdfast.reference.kd_kl_topk import STATS, kd_kl_topk_gradient, kd_kl_topk_hvp, kd_kl_topk_stats
from kdfast.reference.kd_kl_topk import kd_kl_topk as reference

_INPUTS = (
    "Tensor student, Tensor teacher_log_probs, Tensor indices, Tensor? student_temperature, Tensor? labels, "
    "Tensor? weight"
)
LIB = torch.library.Library("kdfast", "FRAGMENT")
LIB.define(
    f"kd_kl_topk({_INPUTS}, float tau_s, int ignore_index, bool temperature_grad) -> (Tensor loss, Tensor stats)"
)
LIB.define(f"kd_kl_topk_backward(Tensor grad, {_INPUTS}, Tensor stats, float tau_s, int ignore_index) -> Tensor")


# ---------------------------------------------------------------- reference kernels (any device)
def _reference_forward(*args):
    return reference(*args[:-1]), kd_kl_topk_stats(*args)


def _reference_backward(grad, *args):
    *tensors, _, tau_s, ignore_index = args
    return (grad.unsqueeze(-1) * kd_kl_topk_gradient(*tensors, tau_s, ignore_index)[0]).to(tensors[0].dtype)


def _fake_forward(student, *args):
    loss = student.new_empty(student.shape[0], dtype=accumulate_dtype(student.dtype))
    return loss, loss.new_empty(student.shape[0], STATS)


def _fake_backward(grad, student, *args):
    return student.new_empty(student.shape)


LIB.impl("kd_kl_topk", _reference_forward, "CompositeExplicitAutograd")
LIB.impl("kd_kl_topk_backward", _reference_backward, "CompositeExplicitAutograd")
torch.library.register_fake("kdfast::kd_kl_topk", _fake_forward, lib=LIB)
torch.library.register_fake("kdfast::kd_kl_topk_backward", _fake_backward, lib=LIB)
_FORWARD = torch.ops.kdfast.kd_kl_topk.default
_BACKWARD = torch.ops.kdfast.kd_kl_topk_backward.default


# ---------------------------------------------------------------- autograd of the bare op (compiled code)
def _op_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.constants = inputs[6:8]


def _op_backward(ctx, grad, _grad_stats):
    *tensors, stats = ctx.saved_tensors
    need_s, _, _, need_tau, *_ = ctx.needs_input_grad
    return (
        _BACKWARD(grad.contiguous(), *tensors, stats, *ctx.constants) if need_s else None,
        None,
        None,
        _like_temperature(grad * stats[:, 4], tensors[3]) if need_tau else None,
        *(None,) * 5,
    )


torch.library.register_autograd("kdfast::kd_kl_topk", _op_backward, setup_context=_op_setup, lib=LIB)


# ---------------------------------------------------------------- Functions (eager code)
def kd_kl_topk(
    student: Tensor,  # [rows, classes]
    teacher_log_probs: Tensor,  # [rows, k], of accumulate_dtype
    indices: Tensor,  # [rows, k] int64
    student_temperature: Tensor | None,  # [1] or [rows], of accumulate_dtype
    labels: Tensor | None,  # [rows] int64
    weight: Tensor | None,  # [rows], of accumulate_dtype
    tau_s: float,
    ignore_index: int,
) -> Tensor:  # [rows]
    """Row losses. Arguments are taken as checked."""
    args = (student, teacher_log_probs, indices, student_temperature, labels, weight, tau_s, ignore_index)
    which = form()
    if which is Form.FUNCTION:
        return (KdKlTopk.apply if in_transform() else _apply)(*args)[0]
    if which is Form.REFERENCE:
        return reference(*args)
    return _FORWARD(*_contiguous(args[:6]), tau_s, ignore_index, student_temperature is not None)[0]


class KdKlTopk(torch.autograd.Function):
    """Row losses and row statistics."""

    @staticmethod
    def forward(student, log_probs, indices, tau, labels, weight, tau_s, ignore_index):
        tensors = _contiguous((student, log_probs, indices, tau, labels, weight))
        with torch._C._AutoDispatchBelowAutograd():  # straight to the kernel
            return _FORWARD(*tensors, tau_s, ignore_index, tau is not None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:6], output[1])
        ctx.save_for_forward(*inputs[:6], output[1])
        ctx.constants = inputs[6:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 8
        *tensors, stats = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[3])
        ds, dtau = _unpack(KdKlTopkBackward.apply(grad, *tensors, stats, *ctx.constants, needs), needs)
        dtau = None if dtau is None else _like_temperature(dtau, tensors[3])
        return ds, None, None, dtau, *(None,) * 4

    @staticmethod
    def jvp(ctx, *tangents):
        *tensors, stats = ctx.saved_tensors
        along = (tangents[0], tangents[3])
        given = tuple(t is not None for t in along)
        grads = KdKlTopkBackward.apply(torch.ones_like(stats[:, 0]), *tensors, stats, *ctx.constants, given)
        grads = _unpack(grads, given)
        return sum(_row_dot(g, t) for g, t in zip(grads, along, strict=True) if g is not None), None

    @staticmethod
    def vmap(info, in_dims, *args):
        out = KdKlTopk.apply(*_fold(info, in_dims[:6], args[:6]), *args[6:])
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in out), (0, 0)


_apply = eager_apply(KdKlTopk)


class KdKlTopkBackward(torch.autograd.Function):
    """Those gradients of sum(grad * row losses), in the student and per row in its temperature, that `needs` asks for.
    Its own derivatives are the closed-form products with the Hessian."""

    @staticmethod
    def forward(grad, student, log_probs, indices, tau, labels, weight, stats, tau_s, ignore_index, needs):
        tensors = _contiguous((student, log_probs, indices, tau, labels, weight))
        grad = in_memory(grad).to(stats.dtype)
        out = []
        if needs[0]:
            with torch._C._AutoDispatchBelowAutograd():
                out.append(_BACKWARD(grad.contiguous(), *tensors, stats, tau_s, ignore_index))
        if needs[1]:
            out.append(grad * stats[:, 4])
        return tuple(out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:7])
        ctx.save_for_forward(*inputs[:7])
        ctx.constants, ctx.needs = inputs[8:10], inputs[10]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        """Of Phi = grad * <gradient, w>: linear in grad, and elsewhere grad * H w."""
        grad, *tensors = ctx.saved_tensors
        w = _unpack(cotangents, ctx.needs)
        if all(x is None for x in w):
            return (None,) * 11
        unit = kd_kl_topk_gradient(*tensors, *ctx.constants)
        d_grad = sum(_row_dot(g, x) for g, x in zip(unit, w, strict=True) if x is not None)
        h, h_tau = kd_kl_topk_hvp(*tensors, *ctx.constants, direction=tuple(w))
        h_tau = None if tensors[3] is None else _like_temperature(h_tau * grad, tensors[3])
        h = (h * grad.unsqueeze(-1)).to(tensors[0].dtype)
        return d_grad.to(grad.dtype), h, None, None, h_tau, *(None,) * 6

    @staticmethod
    def jvp(ctx, *tangents):
        grad, *tensors = ctx.saved_tensors
        grad_dot, direction = tangents[0], (tangents[1], tangents[4])
        out = [0.0, 0.0]
        if any(x is not None for x in direction):
            h, h_tau = kd_kl_topk_hvp(*tensors, *ctx.constants, direction=direction)
            out = [h * grad.unsqueeze(-1), h_tau * grad]
        if grad_dot is not None:
            ds, dtau = kd_kl_topk_gradient(*tensors, *ctx.constants)
            out = [out[0] + ds * grad_dot.unsqueeze(-1), out[1] + dtau * grad_dot]
        dtypes = (tensors[0].dtype, grad.dtype)
        return tuple(o.to(d) for o, n, d in zip(out, ctx.needs, dtypes, strict=True) if n)

    @staticmethod
    def vmap(info, in_dims, *args):
        out = KdKlTopkBackward.apply(*_fold(info, in_dims[:8], args[:8]), *args[8:])
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in out), (0,) * len(out)

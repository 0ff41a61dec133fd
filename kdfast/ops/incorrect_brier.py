"""incorrect_brier: schema, fake, autograd. The formulas stand in kdfast/reference/incorrect_brier.py.

Three dispatcher ops, each with CPU (C++), CUDA (C++ or Triton) and reference kernels:

    incorrect_brier                 row losses and row statistics                     reads logits
    incorrect_brier_backward        elementwise, given the statistics                 reads wrong rows; writes d logits
    incorrect_brier_value_and_grad  coefficient * sum of the losses and its gradient,
                                    in one sweep, the row staying in cache (CPU)      reads logits; writes d logits
"""

import torch
from torch import Tensor

from kdfast.ops._door import Form, eager_apply, form, in_transform
from kdfast.ops.kd_kl import LIB, _contiguous, _fold
from kdfast.reference.incorrect_brier import STATS, incorrect_brier_gradient, incorrect_brier_hvp, incorrect_brier_stats
from kdfast.reference.incorrect_brier import incorrect_brier as reference_incorrect_brier
from kdfast.reference.kd_kl import accumulate_dtype

_INPUTS = "Tensor logits, Tensor? labels, Tensor? target"
LIB.define(f"incorrect_brier({_INPUTS}, int ignore_index) -> (Tensor loss, Tensor stats)")
LIB.define(f"incorrect_brier_backward(Tensor grad, {_INPUTS}, Tensor stats, int ignore_index) -> Tensor")
LIB.define(
    f"incorrect_brier_value_and_grad({_INPUTS}, int ignore_index, float coefficient) -> (Tensor loss, Tensor grad)"
)


# ---------------------------------------------------------------- reference kernels (any device)
def _reference_forward(*args):
    return reference_incorrect_brier(*args), incorrect_brier_stats(*args)


def _reference_backward(grad, logits, labels, target, stats, ignore_index):
    return (grad.unsqueeze(-1) * incorrect_brier_gradient(logits, labels, target, ignore_index)).to(logits.dtype)


def _reference_value_and_grad(logits, labels, target, ignore_index, coefficient):
    loss, stats = torch.ops.kdfast.incorrect_brier(logits, labels, target, ignore_index)
    rows = torch.full_like(loss, coefficient)
    grad = torch.ops.kdfast.incorrect_brier_backward(rows, logits, labels, target, stats, ignore_index)
    return loss.sum() * coefficient, grad


LIB.impl("incorrect_brier", _reference_forward, "CompositeExplicitAutograd")
LIB.impl("incorrect_brier_backward", _reference_backward, "CompositeExplicitAutograd")
LIB.impl("incorrect_brier_value_and_grad", _reference_value_and_grad, "CompositeExplicitAutograd")


# ---------------------------------------------------------------- fakes
def _fake_forward(logits, *args):
    loss = logits.new_empty(logits.shape[0], dtype=accumulate_dtype(logits.dtype))
    return loss, loss.new_empty(logits.shape[0], STATS)


def _fake_backward(grad, logits, *args):
    return logits.new_empty(logits.shape)


def _fake_value_and_grad(logits, *args):
    return logits.new_empty((), dtype=accumulate_dtype(logits.dtype)), logits.new_empty(logits.shape)


torch.library.register_fake("kdfast::incorrect_brier", _fake_forward, lib=LIB)
torch.library.register_fake("kdfast::incorrect_brier_backward", _fake_backward, lib=LIB)
torch.library.register_fake("kdfast::incorrect_brier_value_and_grad", _fake_value_and_grad, lib=LIB)


# ---------------------------------------------------------------- autograd of the bare op (compiled code)
def _op_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.ignore_index = inputs[3]


def _op_backward(ctx, grad, _grad_stats):
    d = torch.ops.kdfast.incorrect_brier_backward(grad.contiguous(), *ctx.saved_tensors, ctx.ignore_index)
    return d, None, None, None


torch.library.register_autograd("kdfast::incorrect_brier", _op_backward, setup_context=_op_setup, lib=LIB)


# ---------------------------------------------------------------- Functions (eager code)
_FORWARD = torch.ops.kdfast.incorrect_brier.default
_BACKWARD = torch.ops.kdfast.incorrect_brier_backward.default
_VALUE_AND_GRAD = torch.ops.kdfast.incorrect_brier_value_and_grad.default


def incorrect_brier(
    logits: Tensor,  # [rows, classes]
    labels: Tensor | None,  # [rows] int64, or
    target: Tensor | None,  # [rows, classes], of accumulate_dtype
    ignore_index: int,
    coefficient: float | None,
) -> Tensor:
    """Row losses [rows], or for a number `coefficient` their sum times it. Arguments are taken as checked."""
    tensors = (logits, labels, target)
    which = form()
    if which is Form.FUNCTION:
        if in_transform():
            return IncorrectBrier.apply(*tensors, ignore_index, coefficient, False)[0]
        grad_now = coefficient is not None and logits.requires_grad and logits.is_cpu and torch.is_grad_enabled()
        return _apply(*tensors, ignore_index, coefficient, grad_now)[0]
    if which is Form.REFERENCE:
        loss = reference_incorrect_brier(*tensors, ignore_index)
    else:
        loss, _ = _FORWARD(*_contiguous(tensors), ignore_index)
    return loss if coefficient is None else loss.sum() * coefficient


class IncorrectBrier(torch.autograd.Function):
    """Row losses, or their sum times `coefficient`, and the row statistics; with `grad_now` the gradient in their
    place, made in the same sweep and kept for the backward, which then costs nothing."""

    @staticmethod
    def forward(logits, labels, target, ignore_index, coefficient, grad_now):
        tensors = _contiguous((logits, labels, target))
        with torch._C._AutoDispatchBelowAutograd():  # straight to the kernel
            if grad_now:
                return _VALUE_AND_GRAD(*tensors, ignore_index, coefficient)
            loss, stats = _FORWARD(*tensors, ignore_index)
        return (loss if coefficient is None else loss.sum() * coefficient), stats

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.ignore_index, ctx.coefficient, grad_now = inputs[3:]
        stats = None if grad_now else output[1]
        ctx.save_for_backward(*inputs[:3], stats)
        ctx.save_for_forward(*inputs[:3], stats)
        ctx.grad = output[1] if grad_now else None
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 6
        d, ctx.grad = ctx.grad, None  # given away: a second backward makes its own
        if d is not None and not torch.is_grad_enabled():
            factor = grad.item()  # a CPU scalar
            return d if factor == 1.0 else d.mul_(factor), *(None,) * 5
        *tensors, stats = ctx.saved_tensors
        rows = grad if ctx.coefficient is None else (grad * ctx.coefficient).expand(tensors[0].shape[0])
        return IncorrectBrierBackward.apply(rows, *tensors, stats, ctx.ignore_index), *(None,) * 5

    @staticmethod
    def jvp(ctx, tangent, *_):
        *tensors, stats = ctx.saved_tensors
        ones = torch.ones_like(tensors[0][:, 0], dtype=accumulate_dtype(tensors[0].dtype))
        per_row = (IncorrectBrierBackward.apply(ones, *tensors, stats, ctx.ignore_index) * tangent).sum(-1)
        per_row = per_row.to(ones.dtype)
        return (per_row if ctx.coefficient is None else per_row.sum() * ctx.coefficient), None

    @staticmethod
    def vmap(info, in_dims, *args):
        loss, stats = IncorrectBrier.apply(*_fold(info, in_dims[:3], args[:3]), args[3], None, False)
        loss, stats = (x.unflatten(0, (info.batch_size, -1)) for x in (loss, stats))
        return (loss if args[4] is None else loss.sum(-1) * args[4], stats), (0, 0)


_apply = eager_apply(IncorrectBrier)


class IncorrectBrierBackward(torch.autograd.Function):
    """The gradient of sum(grad * row losses). Its own derivatives are the closed-form products with the Hessian.
    Without `stats` they are made anew."""

    @staticmethod
    def forward(grad, logits, labels, target, stats, ignore_index):
        tensors = _contiguous((logits, labels, target))
        grad = grad.to(accumulate_dtype(logits.dtype)).contiguous()
        with torch._C._AutoDispatchBelowAutograd():
            if stats is None:
                stats = _FORWARD(*tensors, ignore_index)[1]
            return _BACKWARD(grad, *tensors, stats, ignore_index)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])
        ctx.ignore_index = inputs[5]

    @staticmethod
    def backward(ctx, w):
        """Of Phi = grad * <gradient, w>: linear in grad, and elsewhere grad * H w."""
        grad, *tensors = ctx.saved_tensors
        d_grad = (incorrect_brier_gradient(*tensors, ctx.ignore_index) * w).sum(-1)
        d_logits = grad.unsqueeze(-1) * incorrect_brier_hvp(*tensors, ctx.ignore_index, direction=w)
        return d_grad.to(grad.dtype), d_logits.to(tensors[0].dtype), *(None,) * 4

    @staticmethod
    def jvp(ctx, grad_dot, logits_dot, *_):
        grad, *tensors = ctx.saved_tensors
        out = 0.0
        if logits_dot is not None:
            out = grad.unsqueeze(-1) * incorrect_brier_hvp(*tensors, ctx.ignore_index, direction=logits_dot)
        if grad_dot is not None:
            out = out + grad_dot.unsqueeze(-1) * incorrect_brier_gradient(*tensors, ctx.ignore_index)
        return out.to(tensors[0].dtype)

    @staticmethod
    def vmap(info, in_dims, *args):
        out = IncorrectBrierBackward.apply(*_fold(info, in_dims[:5], args[:5]), args[5])
        return out.unflatten(0, (info.batch_size, -1)), 0

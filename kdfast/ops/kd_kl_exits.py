"""kd_kl_exits: kd_kl of several exits that share their labels, in one op. Formulas: docs/math/kd_kl_exits.md.

    reads students and teachers, writes the students' gradients and, if asked, the teachers': one sweep

CPU (C++), CUDA (C++, one launch where a row fits into a block's shared memory) and reference kernels; Triton has none,
as a kernel there takes no list of tensors: each exit is then kd_kl's own. Whatever is more than one eager backward
(transforms, forward mode, compiled code, higher order) is composed of kd_kl.
"""

import torch
from torch import Tensor

from kdfast.ops._door import Form, form, grads_batched, in_forward_mode, in_transform
from kdfast.ops.kd_kl import _OPTIONS, LIB, KdKlBackward, kd_kl
from kdfast.reference.kd_kl import Options, accumulate_dtype

LIB.define(
    f"kd_kl_exits(Tensor[] students, Tensor[] teachers, Tensor? labels, {_OPTIONS}, float coefficient, "
    "bool teacher_grads) -> (Tensor losses, Tensor[] student_grads, Tensor[] teacher_grads)"
)


def _reference(students, teachers, labels, *args):
    *options, coefficient, teacher_grads = args
    losses, ds, dt = [], [], []
    for student, teacher in zip(students, teachers, strict=True):
        tensors = (student, teacher, None, None, labels, None, None)
        loss, stats = torch.ops.kdfast.kd_kl(*tensors, *options, False)
        grad = torch.full_like(loss, coefficient)
        both = torch.ops.kdfast.kd_kl_backward(grad, *tensors, stats, *options, True, teacher_grads)
        losses.append(loss.sum() * coefficient)
        ds.append(both[0])
        dt += [both[1]] if teacher_grads else []
    return torch.stack(losses), ds, dt


def _fake(students, teachers, labels, *args):
    losses = students[0].new_empty(len(students), dtype=accumulate_dtype(students[0].dtype))
    teacher_grads = [t.new_empty(t.shape) for t in teachers] if args[-1] else []
    return losses, [s.new_empty(s.shape) for s in students], teacher_grads


LIB.impl("kd_kl_exits", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("kdfast::kd_kl_exits", _fake, lib=LIB)


def kd_kl_exits(
    students: list[Tensor],  # exits of [rows, classes], one dtype
    teachers: list[Tensor],  # the same
    labels: Tensor | None,  # [rows] int64
    options: Options,  # of a plain divergence: forward_kl, reverse_kl, soft_ce
    coefficient: float,
) -> Tensor:  # [exits]
    """coefficient * sum of the row losses of each exit. Arguments are taken as checked."""
    once = (
        form() is Form.FUNCTION
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in (*students, *teachers))
        and not in_transform()
        and not in_forward_mode()
    )
    if once:
        return KdKlExits.apply(labels, options, coefficient, *students, *teachers)
    tensors = zip(students, teachers, strict=True)
    return torch.stack([kd_kl(s, t, None, None, labels, None, None, options, coefficient) for s, t in tensors])


class KdKlExits(torch.autograd.Function):
    """The losses of all exits; the gradients are made in the same sweep and kept for the backward."""

    @staticmethod
    def forward(ctx, labels, options, coefficient, *logits):
        exits = len(logits) // 2
        contiguous, classes = [x.contiguous() for x in logits], labels if labels is None else labels.contiguous()
        teachers_learn = any(ctx.needs_input_grad[3 + exits :])
        with torch._C._AutoDispatchBelowAutograd():  # straight to the kernel
            losses, ds, dt = torch.ops.kdfast.kd_kl_exits.default(
                contiguous[:exits], contiguous[exits:], classes, *options, coefficient, teachers_learn
            )
        ctx.grads = [*ds, *(dt if teachers_learn else [None] * exits)]
        ctx.save_for_backward(labels, *logits)
        ctx.options, ctx.coefficient = options, coefficient
        return losses

    @staticmethod
    def backward(ctx, grad):  # [exits]
        grads, ctx.grads = ctx.grads, None  # given away: a second backward makes its own
        if grads is None or torch.is_grad_enabled() or grads_batched(grad):
            return None, None, None, *_again(ctx, grad)
        exits = len(grads) // 2
        factors = grad.tolist() if grad.is_cpu else grad.unbind()  # on a GPU not read: that would wait
        for i, x in enumerate(grads):
            if x is None:
                continue
            if not grad.is_cpu:
                torch.ops.kdfast.kd_kl_scale_(x, factors[i % exits])
            elif factors[i % exits] != 1.0:
                x.mul_(factors[i % exits])
        needs = ctx.needs_input_grad[3:]
        return None, None, None, *(x if needed else None for x, needed in zip(grads, needs, strict=True))


def _again(ctx, grad) -> list[Tensor | None]:
    """The gradients, differentiable: each exit's by kd_kl's backward."""
    labels, *logits = ctx.saved_tensors
    exits, needs, found = len(logits) // 2, ctx.needs_input_grad[3:], [None] * len(logits)
    for k in range(exits):
        wanted = (needs[k], needs[exits + k], False, False)
        if not any(wanted):
            continue
        tensors = (logits[k], logits[exits + k], None, None, labels, None, None)
        with torch.no_grad():
            plain = [x if x is None else x.detach().contiguous() for x in tensors]
            _, stats = torch.ops.kdfast.kd_kl(*plain, *ctx.options, False)
        rows = (grad[k] * ctx.coefficient).expand(stats.shape[0])
        made = iter(KdKlBackward.apply(rows, *tensors, stats, ctx.options, wanted))
        for i in (k, exits + k):
            found[i] = next(made) if needs[i] else None
    return found

"""topk_kd_loss: distillation from the k likeliest classes of a teacher, and topk_teacher, which takes them."""

import math

import torch
from torch import Tensor

from kdfast.losses import _checks as check
from kdfast.losses.kd_kl import REDUCTIONS
from kdfast.ops.kd_kl import kd_kl
from kdfast.ops.kd_kl_topk import kd_kl_topk
from kdfast.reference.kd_kl import Options, accumulate_dtype


def topk_teacher(
    teacher_logits: Tensor,  # [..., classes]
    k: int,
    temperature: float = 4.0,
) -> tuple[Tensor, Tensor]:  # [..., k] log-probabilities, [..., k] int64 class indices
    """The k likeliest classes of a teacher: what `topk_kd_loss` needs of it, to be kept in place of its logits.

    Args:
        teacher_logits: ``[..., classes]``, any floating type. No gradient flows back.
        k: how many classes, in ``[1, classes]``.
        temperature: the teacher's, positive; its log-probabilities are taken at it.

    Returns:
        ``(log_probs, indices)``, likeliest first: fp32 (fp64 for fp64 logits), and int64. What the k classes leave of
        the teacher's probability is the tail of ``topk_kd_loss``.

    Raises:
        TypeError, ValueError: one sentence saying what was expected and what came.

    Example:
        >>> log_probs, indices = topk_teacher(torch.randn(8, 1000), k=20)
        >>> log_probs.shape, indices.shape
        (torch.Size([8, 20]), torch.Size([8, 20]))
    """
    check.logits(teacher_logits, teacher_logits)
    classes = teacher_logits.shape[-1]
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be a whole number of classes, got {type(k).__name__}.")
    if not 1 <= k <= classes:
        raise ValueError(f"k must be in [1, {classes}], the number of classes, got {k}.")
    tau, tensor = check.temperature("temperature", temperature, teacher_logits)
    if tensor is not None:
        raise TypeError("temperature must be a number here, got a tensor; pass temperature.item().")
    z = teacher_logits.detach()
    values, indices = z.topk(k, dim=-1)
    dtype = accumulate_dtype(z.dtype)
    top = values[..., :1].to(dtype)  # of the row: differences are taken before they are divided, as in kd_loss
    log_z = ((z.to(dtype) - top) / tau).logsumexp(-1, keepdim=True)
    return (values.to(dtype) - top) / tau - log_z, indices


def topk_kd_loss(
    student_logits: Tensor,  # [..., classes]
    teacher_log_probs: Tensor,  # [..., k]
    teacher_indices: Tensor,  # [..., k] class indices, distinct in a row
    labels: Tensor | None = None,  # [...] class indices, or [..., classes] probabilities
    *,
    alpha: float = 0.5,
    student_temperature: float | Tensor = 4.0,  # one value, or [...]
    weight: Tensor | None = None,  # [...]
    ignore_index: int = -100,
    reduction: str = "batchmean",
) -> Tensor:  # scalar, or [...] for reduction="none"
    """`kd_loss` where only the teacher's k likeliest classes are known; the rest of its probability is one class more.

    For each row, p the teacher's probabilities and q = softmax(student/tau_s)::

        D = sum over the k listed of p (log p - log q) + p_tail (log p_tail - log q_tail)
        loss = alpha * CE(student, labels) + (1 - alpha) * tau_s^2 * D

    with p_tail what the k probabilities leave of one and q_tail the student's share of the other classes. With every
    class listed this is `kd_loss` of forward KL. Gradients flow to the student's logits, its temperature and weight.

    Args:
        student_logits: ``[..., classes]``, any floating type. A logit of ``-inf`` masks its class.
        teacher_log_probs: ``[..., k]``, log-probabilities at the teacher's temperature, their probabilities adding up
            to at most one. They are data: a tensor that requires a gradient is refused. `topk_teacher` makes them.
        teacher_indices: ``[..., k]`` integers in ``[0, classes)``, no class twice in a row.
        labels: class indices ``[...]`` in ``[0, classes)`` or ``ignore_index``, or probabilities ``[..., classes]``.
            An ignored row counts for nothing, distillation included.
        alpha: share of the hard-label term, in ``[0, 1]``. Used only with labels.
        student_temperature: tau_s > 0, a float or a tensor of one value or one a row, with gradient.
        weight: one factor a row ``[...]``.
        ignore_index: the label of rows to leave out.
        reduction: ``"batchmean"``, ``"mean"``, ``"sum"`` or ``"none"``, as in `kd_loss`.

    Returns:
        A scalar, or ``[...]`` for ``reduction="none"``; fp32, or fp64 for fp64 logits.

    Raises:
        TypeError, ValueError: one sentence saying what was expected and what came. Indices and labels out of range are
            found in eager code on the CPU by the NaN they make in the loss; elsewhere the loss stays NaN.

    Source: Hinton, Vinyals, Dean 2015 (arXiv:1503.02531) for the loss; the KL divergence of the distributions in which
        the classes not listed are merged, which is at most that of all classes (Cover, Thomas, Elements of Information
        Theory, 2nd edition, section 2.7).

    Example:
        >>> student = torch.randn(8, 1000, requires_grad=True)
        >>> log_probs, indices = topk_teacher(torch.randn(8, 1000), k=20, temperature=4.0)
        >>> loss = topk_kd_loss(student, log_probs, indices, torch.randint(1000, (8,)), alpha=0.1)
        >>> loss.backward()
    """
    check.logits(student_logits, student_logits)
    shape, classes = student_logits.shape, student_logits.shape[-1]
    _teacher(student_logits, teacher_log_probs, teacher_indices)
    check.choice("reduction", reduction, REDUCTIONS)
    check.fraction("alpha", alpha)
    tau_s, tau_tensor = check.temperature("student_temperature", student_temperature, student_logits)
    class_labels, target = check.labels(labels, student_logits)
    learned_weight = None
    if weight is not None:
        weight = check.row_weight(weight, student_logits)
        if weight.requires_grad:  # outside the kernel, so that it has its gradient
            learned_weight, weight = weight, None

    rows, k = math.prod(shape[:-1]), teacher_indices.shape[-1]
    student = student_logits.reshape(rows, classes)
    class_labels = None if class_labels is None else class_labels.reshape(rows)
    target = None if target is None else target.reshape(rows, classes)
    log_probs = teacher_log_probs.reshape(rows, k).to(accumulate_dtype(student.dtype))
    indices = teacher_indices.reshape(rows, k).to(torch.int64)

    loss = kd_kl_topk(student, log_probs, indices, tau_tensor, class_labels, weight, tau_s, ignore_index)
    if labels is not None:
        hard_only = Options(alpha=1.0, ignore_index=ignore_index)
        hard = kd_kl(student, student.detach(), None, None, class_labels, target, weight, hard_only, None)
        loss = alpha * hard + (1 - alpha) * loss
    _result(loss, indices, class_labels, ignore_index, classes)
    if learned_weight is not None:
        loss = loss * learned_weight
    if reduction == "none":
        return loss.reshape(shape[:-1])
    if reduction == "mean":
        divisor = max(rows, 1) if class_labels is None else check.count(class_labels, ignore_index)
    else:
        divisor = 1 if reduction == "sum" or len(shape) == 1 else max(shape[0], 1)
    return loss.sum() / divisor


def _teacher(student: Tensor, log_probs: Tensor, indices: Tensor) -> None:
    for name, x in (("teacher_log_probs", log_probs), ("teacher_indices", indices)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor [..., k], got {type(x).__name__}; topk_teacher makes it.")
        if x.dim() == 0 or x.shape[:-1] != student.shape[:-1] or not 1 <= x.shape[-1] <= student.shape[-1]:
            raise ValueError(
                f"{name} must be [..., k] with the leading dimensions of student_logits {tuple(student.shape)} and k "
                f"at most its number of classes, got {tuple(x.shape)}."
            )
        if x.device != student.device:
            raise ValueError(f"{name} must be on the logits' device {student.device}, got {x.device}.")
    if log_probs.shape != indices.shape:
        raise ValueError(
            f"teacher_log_probs and teacher_indices must have one shape [..., k], got {tuple(log_probs.shape)} and "
            f"{tuple(indices.shape)}."
        )
    if not log_probs.is_floating_point():
        raise TypeError(f"teacher_log_probs must be floating point log-probabilities, got {log_probs.dtype}.")
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"teacher_indices must be integer class indices, got {indices.dtype}.")
    if log_probs.requires_grad:
        raise ValueError(
            "teacher_log_probs have no gradient here; pass teacher_log_probs.detach(), or the whole logits to kd_loss."
        )


def _result(loss: Tensor, indices: Tensor, labels: Tensor | None, ignore_index: int, classes: int) -> None:
    """On the CPU a NaN loss is traced to its cause; kernels give NaN for an index that is no class."""
    if not check._readable(loss) or not math.isnan(loss.detach().sum().item()):
        return
    check._labels(labels, ignore_index, classes)
    counted = indices if labels is None else indices[labels != ignore_index]
    outside = (counted < 0) | (counted >= classes)
    if bool(outside.any()):
        raise ValueError(f"teacher_indices must be in [0, {classes}), got {counted[outside][0].item()}.")

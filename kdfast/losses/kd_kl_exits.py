"""exits_kd_loss: the distillation loss of several early exits, in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.losses import _checks as check
from kdfast.losses import kd_kl
from kdfast.losses.kd_kl import DIVERGENCES, SCALES
from kdfast.ops.kd_kl_exits import kd_kl_exits
from kdfast.reference.kd_kl import Options

PLAIN = ("forward_kl", "reverse_kl", "soft_ce")
REDUCTIONS = ("batchmean", "sum")


def exits_kd_loss(
    student_logits: Sequence[Tensor],  # exits of [rows, classes]
    teacher_logits: Sequence[Tensor],  # exits of [rows, classes]
    labels: Tensor | None = None,  # [rows] class indices
    *,
    alpha: float = 0.5,
    student_temperature: float = 1.0,
    teacher_temperature: float | None = None,
    scale: str = "tau2",
    divergence: str = "forward_kl",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "batchmean",
) -> Tensor:  # [exits]
    """`kd_loss` of several exits of one network, each with soft targets of its own and all with the same labels.

    As ``torch.stack([kd_loss(s, t, labels, ...) for s, t in zip(student_logits, teacher_logits)])``, in one sweep that
    makes loss and gradients together: those of the targets too, where they learn. Second order and forward mode are
    exact.

    Args:
        student_logits: each exit's ``[rows, classes]``, all of one shape, dtype and device.
        teacher_logits: as many, of the same shape: the targets before their softmax.
        labels: class indices ``[rows]`` in ``[0, classes)`` or ``ignore_index``.
        alpha: share of the hard-label term, in ``[0, 1]``. Used only with labels.
        student_temperature: tau_s > 0, a number; the default, 1, is MetaDistiller's.
        teacher_temperature: tau_t > 0; ``None`` means the student's.
        scale: factor on the divergence: ``"tau2"``, ``"product"`` or ``"none"``, as for `kd_loss`.
        divergence: ``"forward_kl"``, ``"reverse_kl"`` or ``"soft_ce"``.
        ignore_index: the label of rows to leave out.
        label_smoothing: in ``[0, 1]``.
        reduction: ``"batchmean"`` divides each exit's sum by the number of rows; ``"sum"``.

    Returns:
        ``[exits]``, fp32, or fp64 for fp64 logits: weigh and sum them as you like.

    Raises:
        TypeError, ValueError: one sentence saying what was expected and what came; labels out of range and NaN in a
            teacher are found as in `kd_loss`.

    Source: Liu et al., "MetaDistiller: Network Self-Boosting via Meta-Learned Top-Down Distillation", ECCV 2020
        (arXiv:2008.12094), equations 3 and 4.

    Example:
        >>> exits = [torch.randn(8, 10, requires_grad=True) for _ in range(3)]
        >>> targets = [torch.randn(8, 10) for _ in range(3)]
        >>> exits_kd_loss(exits, targets, torch.randint(10, (8,))).sum().backward()
    """
    students, teachers = list(student_logits), list(teacher_logits)
    if not students or len(students) != len(teachers):
        raise ValueError(
            f"student_logits and teacher_logits must be as many, at least one, got {len(students)} and {len(teachers)}."
        )
    # On the CPU a node in C++ an exit is less Python than all of them in one Function.
    tau_t = student_temperature if teacher_temperature is None else teacher_temperature
    numbers = (
        student_temperature, tau_t, alpha, label_smoothing, ignore_index, divergence, scale, None, 1.0, None, 1.0,
        reduction, labels is None,
    )  # fmt: skip
    if divergence in PLAIN and reduction in REDUCTIONS:
        losses = kd_kl.plain_losses(students, teachers, labels, numbers, reduction)
        if losses is not None:
            return losses
    for student, teacher in zip(students, teachers, strict=True):
        check.logits(student, teacher)
        for name, x in (("student_logits", student), ("teacher_logits", teacher)):
            if x.shape != students[0].shape or x.dim() != 2 or x.device != students[0].device:
                raise ValueError(
                    f"{name} must all be [rows, classes] of one shape on one device, got {list(students[0].shape)} on "
                    f"{students[0].device} and {list(x.shape)} on {x.device}; select the rows and classes they share."
                )
    check.choice("divergence", divergence, PLAIN)
    check.choice("scale", scale, SCALES)
    check.choice("reduction", reduction, REDUCTIONS)
    check.fraction("alpha", alpha)
    check.fraction("label_smoothing", label_smoothing)
    tau_s = check.positive("student_temperature", student_temperature)
    tau_t = tau_s if teacher_temperature is None else check.positive("teacher_temperature", teacher_temperature)
    indices, probabilities = check.labels(labels, students[0])
    if probabilities is not None:
        raise TypeError("labels must be class indices [rows], got probabilities; pass each exit to kd_loss for those.")
    if check.CHECK_VALUES:
        for student, teacher in zip(students, teachers, strict=True):
            check.values(student, teacher, indices, ignore_index)
    dtype = students[0].dtype
    for x in (*students, *teachers):
        dtype = torch.promote_types(dtype, x.dtype)
    students, teachers = ([x.to(dtype) for x in logits] for logits in (students, teachers))
    rows, classes = students[0].shape
    options = Options(
        tau_s, tau_t, 0.0 if labels is None else float(alpha), float(label_smoothing), ignore_index,
        DIVERGENCES[divergence], SCALES[scale],
    )  # fmt: skip
    losses = kd_kl_exits(students, teachers, indices, options, 1.0 / max(rows, 1) if reduction == "batchmean" else 1.0)
    check.results(losses, teachers, indices, ignore_index, classes)
    return losses

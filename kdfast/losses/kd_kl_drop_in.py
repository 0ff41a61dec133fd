"""Losses under the names and with the arguments they have elsewhere, each one call of `kd_loss`."""

from torch import Tensor

from kdfast.losses import _checks as check
from kdfast.losses.kd_kl import kd_loss


def dkd_loss(
    logits_student: Tensor,  # [rows, classes]
    logits_teacher: Tensor,  # [rows, classes]
    target: Tensor,  # [rows] class indices
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:  # scalar
    """Decoupled knowledge distillation, with the arguments of mdistiller's function of this name.

    ``temperature^2 * mean over rows (alpha * TCKD + beta * NCKD)``: TCKD is the KL of the labelled class against all
    others together, NCKD the KL among the others. There is no hard-label term. Masked classes are left out exactly.

    Args:
        logits_student: ``[rows, classes]``, any floating type.
        logits_teacher: same shape.
        target: class indices ``[rows]``; a row of -100 adds nothing.
        alpha: weight of TCKD, at least 0.
        beta: weight of NCKD, at least 0.
        temperature: of both networks, > 0.

    Returns:
        A scalar, fp32 (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError: as `kd_loss`.

    Source: Zhao et al., "Decoupled Knowledge Distillation", 2022 (arXiv:2203.08679).

    Example:
        >>> dkd_loss(torch.randn(8, 10), torch.randn(8, 10), torch.randint(10, (8,)), beta=2.0).shape
        torch.Size([])
    """
    return kd_loss(
        logits_student, logits_teacher, target, alpha=0.0, student_temperature=temperature, divergence="dkd",
        beta=beta, target_weight=alpha,
    )  # fmt: skip


def generalized_jsd_loss(
    student_logits: Tensor,  # [..., classes]
    teacher_logits: Tensor,  # [..., classes]
    labels: Tensor | None = None,  # [...] class indices
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,  # a scalar
) -> Tensor:  # scalar
    """The generalised Jensen-Shannon divergence, with the arguments of TRL's function of this name.

    ``beta KL(teacher || m) + (1 - beta) KL(student || m)``, ``m = beta teacher + (1 - beta) student``; forward KL for
    ``beta=0``, reverse KL for ``beta=1``. Temperatures do not rescale the loss.

    Args:
        student_logits: ``[..., classes]``, any floating type.
        teacher_logits: same shape.
        labels: ``[...]``; only positions whose label is not -100 count.
        beta: the teacher's share of the mixture, in ``[0, 1]``.
        temperature: of both networks, > 0.
        reduction: ``"batchmean"`` divides the sum by the number of positions that count where labels are given, and by
            the size of the first dimension where not; ``"mean"`` by the number of positions that count times the
            classes; ``"sum"``.
        num_items_in_batch: what ``"batchmean"`` divides the sum by instead, > 0: the positions of all the batches that
            a step is accumulated of.

    Returns:
        A scalar, fp32 (fp64 for fp64 logits); 0 where no position counts.

    Raises:
        TypeError, ValueError: as `kd_loss`. There is no ``reduction="none"``, whose matrix ``[..., classes]`` is never
            made; ``kd_loss(..., divergence="jsd", reduction="none")`` gives a loss a position.

    Source: Agarwal et al., "On-Policy Distillation of Language Models", 2023 (arXiv:2306.13649).

    Example:
        >>> generalized_jsd_loss(torch.randn(2, 5, 10), torch.randn(2, 5, 10), beta=0.9).shape
        torch.Size([])
    """
    check.fraction("beta", beta)
    check.choice("reduction", reduction, ("batchmean", "mean", "sum"))
    if labels is not None and (not isinstance(labels, Tensor) or labels.is_floating_point()):
        came = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of class indices, got {came}.")
    counted = num_items_in_batch is not None
    if counted and reduction != "batchmean":
        raise ValueError(f"num_items_in_batch belongs to reduction='batchmean', got reduction={reduction!r}.")
    if 0 < beta < 1:
        options = {"divergence": "jsd", "beta": beta}
    else:
        options = {"divergence": "forward_kl" if beta == 0 else "reverse_kl"}
    per_position = reduction == "mean" or (reduction == "batchmean" and labels is not None and not counted)
    loss = kd_loss(
        student_logits, teacher_logits, labels, alpha=0.0, student_temperature=temperature, scale="none",
        reduction="mean" if per_position else "sum" if counted else reduction, **options,
    )  # fmt: skip
    if counted:
        return loss / num_items_in_batch
    return loss / student_logits.shape[-1] if reduction == "mean" else loss

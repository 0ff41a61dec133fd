"""incorrect_brier: the squared error of the class probabilities, over the rows that are classified wrongly."""

import math

from torch import Tensor

from kdfast.losses import _checks as check
from kdfast.ops import incorrect_brier as op
from kdfast.reference.kd_kl import accumulate_dtype

REDUCTIONS = ("none", "sum", "mean")


def incorrect_brier(
    logits: Tensor,  # [..., classes]
    labels: Tensor,  # [...] class indices, or [..., classes] probabilities
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:  # scalar, or [...] for reduction="none"
    """Squared error of the class probabilities, over the rows that are classified wrongly.

    For each row (each position of the leading dimensions), with ``p = softmax(logits)`` and ``y`` the label's
    one-hot vector, or the probabilities given::

        loss = sum_j (p_j - y_j)^2   where argmax(logits) != argmax(y),   else 0

    Among equal logits (and equal probabilities) the first counts as the largest, as in ``torch.argmax``. A row
    that is right has gradient 0 too: where all are right the loss is 0 and nothing moves. Gradients flow to the
    logits; second order and forward mode are exact.

    Args:
        logits: ``[..., classes]``, any floating type. A logit of ``-inf`` masks its class.
        labels: class indices ``[...]`` in ``[0, classes)`` or ``ignore_index``, or probabilities ``[..., classes]``
            (mixup, cutmix), whose largest is the class that should be predicted.
        reduction: ``"mean"`` divides the sum by the number of rows that are not ignored, right ones included: the
            paper sums, which ties a learning rate to the batch size. ``"sum"``, or ``"none"``.
        ignore_index: the label of rows to leave out.

    Returns:
        A scalar, or ``[...]`` for ``reduction="none"``; fp32, or fp64 for fp64 logits.

    Raises:
        TypeError, ValueError: one sentence saying what was expected and what came. Labels out of range are found
            in eager code on the CPU at no cost, by the NaN they make in the loss; on a GPU the check would wait for
            the device and is made only under ``KDFAST_CHECK_VALUES=1``.

    Source: Liu et al., "Meta Knowledge Distillation", 2022 (arXiv:2202.07940), equation 8.

    Example:
        >>> logits = torch.randn(8, 10, requires_grad=True)
        >>> incorrect_brier(logits, torch.randint(10, (8,))).backward()
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor [..., classes], got {type(logits).__name__}.")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}; call .float() on them first.")
    shape = logits.shape
    if logits.dim() == 0 or shape[-1] == 0:
        raise ValueError(f"logits must be [..., classes] with at least one class, got {list(shape)}.")
    if labels is None:
        raise TypeError("labels must be a tensor of class indices or probabilities, got None.")
    check.choice("reduction", reduction, REDUCTIONS)
    indices, target = check.labels(labels, logits)

    rows = math.prod(shape[:-1])
    if len(shape) != 2:
        logits = logits.reshape(rows, shape[-1])
        indices = None if indices is None else indices.reshape(rows)
        target = None if target is None else target.reshape(rows, shape[-1])
    if target is not None:
        target = target.to(accumulate_dtype(logits.dtype))
    divisor = 1
    if reduction == "mean":
        divisor = max(rows, 1) if indices is None else check.count(indices, ignore_index)
    if isinstance(divisor, Tensor):  # a count on the device: no sync
        loss = op.incorrect_brier(logits, indices, target, ignore_index, 1.0) / divisor
    else:
        coefficient = None if reduction == "none" else 1.0 / divisor
        loss = op.incorrect_brier(logits, indices, target, ignore_index, coefficient)
    check.label_range(loss, indices, ignore_index, shape[-1])
    return loss.reshape(shape[:-1]) if reduction == "none" else loss

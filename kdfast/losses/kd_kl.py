"""kd_loss: temperature-softmax distillation, with or without hard labels, in one fused sweep."""

import functools
import math

import torch
from torch import Tensor, nn

from kdfast import _native
from kdfast.losses import _checks as check
from kdfast.ops.kd_kl import kd_kl
from kdfast.reference.kd_kl import Options, accumulate_dtype

DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "soft_ce": 2, "jsd": 3, "dkd": 4}
SCALES = {"tau2": 0, "product": 1, "none": 2}
REDUCTIONS = ("none", "sum", "mean", "batchmean")
# The plain call without Python below this file (csrc/autograd/kd_kl.cpp), for reductions that need no count.
_OVER_ROWS = {"batchmean": True, "sum": False}
_now = None if _native.autograd is None else _native.autograd.kd_kl_now


def kd_loss(
    student_logits: Tensor,  # [..., classes]
    teacher_logits: Tensor,  # [..., classes]
    labels: Tensor | None = None,  # [...] class indices, or [..., classes] probabilities
    *,
    alpha: float = 0.5,
    student_temperature: float | Tensor = 4.0,  # one value, or [...]
    teacher_temperature: float | Tensor | None = None,  # one value, or [...]
    scale: str = "tau2",
    divergence: str = "forward_kl",
    weight: Tensor | None = None,  # [...]
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "batchmean",
    beta: float | None = None,
    target_weight: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    fuse_backward: bool = False,
) -> Tensor:  # scalar, or [...] for reduction="none"
    """How far the student's softened class probabilities are from the teacher's, plus the hard-label loss.

    For each row (each position of the leading dimensions)::

        loss = alpha * CE(student, labels) + (1 - alpha) * scale * KL(softmax(teacher/tau_t) || softmax(student/tau_s))

    and only the second term, as if alpha were 0, without labels. Gradients flow to both logits and to both
    temperatures where these are tensors that require them; second order and forward mode are exact.

    Args:
        student_logits: ``[..., classes]``, any floating type. A logit of ``-inf`` masks its class. The classes come
            last: of a map ``[batch, classes, height, width]`` pass ``.movedim(1, -1)``.
        teacher_logits: same shape. Give it detached (or under ``no_grad``) unless it should learn too.
        labels: class indices ``[...]`` in ``[0, classes)`` or ``ignore_index``, or probabilities
            ``[..., classes]`` (mixup, cutmix). An ignored row counts for nothing, distillation included.
        alpha: share of the hard-label term, in ``[0, 1]``. Used only with labels.
        student_temperature: tau_s > 0, a float or a tensor of one value or one a row, with gradient.
        teacher_temperature: tau_t > 0; ``None`` means the student's.
        scale: factor on the divergence: ``"tau2"`` (tau_s squared, Hinton's), ``"product"`` (tau_s tau_t),
            or ``"none"``.
        divergence: ``"forward_kl"`` KL(teacher || student), ``"reverse_kl"`` KL(student || teacher),
            ``"soft_ce"`` (cross-entropy between the two, which is forward KL plus the teacher's entropy),
            ``"jsd"`` (generalised Jensen-Shannon: beta KL(teacher || m) + (1 - beta) KL(student || m) with the mixture
            m = beta teacher + (1 - beta) student), or ``"dkd"`` (decoupled: target_weight times the KL of the labelled
            class against all others together, plus beta times the KL among the others; needs class-index labels, for
            ``alpha=0`` too).
        weight: one factor a row ``[...]``.
        ignore_index: the label of rows to leave out.
        label_smoothing: in ``[0, 1]``; its mass goes evenly to the classes that are not masked.
        reduction: ``"batchmean"`` sums the rows and divides by the size of the first dimension, as
            ``torch.nn.functional.kl_div`` does; ``"mean"`` divides by the number of rows that are not
            ignored (for tokens or pixels); ``"sum"``; or ``"none"``. Over no rows the loss is 0.
        beta: for ``"jsd"`` in (0, 1), 0.5 unless given; for ``"dkd"`` at least 0, 8 unless given.
        target_weight: at least 0; for ``"dkd"`` only.
        softcap: both networks' logits x become ``softcap * tanh(x / softcap)`` before anything else, the hard-label
            loss included; ``None``: they stay. A masked class stays masked.
        logit_scale: factor > 0 on both networks' logits, before the softcap.
        fuse_backward: on a GPU, whether the student's gradient is made by the kernel that makes the loss: 3 passes over
            the logits instead of 5 where a row fits on the chip, one pass more where the loss is then scaled (AMP). It
            costs memory for the gradient from the forward on. On the CPU it is always so.

    Returns:
        A scalar, or ``[...]`` for ``reduction="none"``; fp32, or fp64 for fp64 logits.

    Raises:
        TypeError, ValueError: one sentence saying what was expected and what came. Labels out of range and
            NaN in the teacher are found in eager code on the CPU at no cost, by the NaN they make in the loss; on a
            GPU the check would wait for the device and is made only under ``KDFAST_CHECK_VALUES=1``.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv:1503.02531);
        ``"jsd"``: Agarwal et al., "On-Policy Distillation of Language Models", 2023 (arXiv:2306.13649);
        ``"dkd"``: Zhao et al., "Decoupled Knowledge Distillation", 2022 (arXiv:2203.08679).

    Example:
        >>> student, teacher = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
        >>> loss = kd_loss(student, teacher, torch.randint(10, (8,)), alpha=0.1, student_temperature=4.0)
        >>> loss.backward()
    """
    if (
        _now is not None
        and weight is None
        and reduction in _OVER_ROWS
        and not isinstance(student_temperature, Tensor)
        and not isinstance(teacher_temperature, Tensor)
        and not check.CHECK_VALUES
        and not torch.compiler.is_compiling()
    ):
        tau_t = student_temperature if teacher_temperature is None else teacher_temperature
        options = _options(
            student_temperature, tau_t, alpha, label_smoothing, ignore_index, divergence, scale,
            beta, target_weight, softcap, logit_scale, reduction, labels is None,
        )  # fmt: skip
        loss = _now(student_logits, teacher_logits, labels, options, _OVER_ROWS[reduction], fuse_backward)
        if loss is not None:
            return loss
    check.logits(student_logits, teacher_logits)
    shape = student_logits.shape
    classes, rows = shape[-1], math.prod(shape[:-1])
    tau_s, tau_s_tensor = student_temperature, None
    if isinstance(tau_s, Tensor):
        tau_s, tau_s_tensor = check.temperature("student_temperature", tau_s, student_logits)
    tau_t, tau_t_tensor = teacher_temperature, None
    if tau_t is None:
        tau_t, tau_t_tensor = tau_s, tau_s_tensor
    elif isinstance(tau_t, Tensor):
        tau_t, tau_t_tensor = check.temperature("teacher_temperature", tau_t, student_logits)
    options = _options_once if torch.compiler.is_compiling() else _options
    options = options(
        tau_s, tau_t, alpha, label_smoothing, ignore_index, divergence, scale,
        beta, target_weight, softcap, logit_scale, reduction, labels is None,
    )  # fmt: skip
    indices = target = None
    if labels is not None:
        indices, target = check.labels(labels, student_logits)
    if divergence == "dkd":
        check.class_indices(labels, student_logits)
    if check.CHECK_VALUES:
        check.values(student_logits, teacher_logits, indices, ignore_index)
    learned_weight = None
    if weight is not None:
        weight = check.row_weight(weight, student_logits)
        if weight.requires_grad:  # outside the kernel, so that it has its gradient
            learned_weight, weight = weight, None

    if len(shape) != 2:
        student_logits, teacher_logits = (z.reshape(rows, classes) for z in (student_logits, teacher_logits))
        indices = None if indices is None else indices.reshape(rows)
        target = None if target is None else target.reshape(rows, classes)
    if student_logits.dtype != teacher_logits.dtype:
        dtype = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
        student_logits, teacher_logits = student_logits.to(dtype), teacher_logits.to(dtype)

    coefficient = None if reduction == "none" or learned_weight is not None else 1.0
    if reduction == "batchmean":
        divisor = max(shape[0], 1) if len(shape) > 1 else 1
    elif reduction == "mean":
        divisor = max(rows, 1) if indices is None else check.count(indices, ignore_index)
    else:
        divisor = 1
    if coefficient is not None and not isinstance(divisor, Tensor):
        coefficient, divisor = 1.0 / divisor, 1
    elif coefficient is not None and isinstance(divisor, Tensor):  # a count on the device: no sync
        share = 1.0 / divisor.to(accumulate_dtype(student_logits.dtype))
        weight, divisor = (share.expand(rows) if weight is None else weight * share), 1

    loss = kd_kl(
        student_logits, teacher_logits, tau_s_tensor, tau_t_tensor, indices, target, weight, options, coefficient,
        fuse_backward,
    )  # fmt: skip
    check.result(loss, teacher_logits, indices, ignore_index, classes)
    if learned_weight is not None:
        loss = loss * learned_weight
        loss = loss if reduction == "none" else loss.sum() / divisor
    return loss.reshape(shape[:-1]) if reduction == "none" else loss


def _options_once(
    tau_s, tau_t, alpha, label_smoothing, ignore_index, divergence, scale, beta, target_weight, softcap, logit_scale,
    reduction, no_labels,
) -> Options:  # fmt: skip
    """The numbers of one call, checked, as the op takes them."""
    check.choice("divergence", divergence, DIVERGENCES)
    check.choice("scale", scale, SCALES)
    check.choice("reduction", reduction, REDUCTIONS)
    check.fraction("alpha", alpha)
    check.fraction("label_smoothing", label_smoothing)
    tau_s = check.positive("student_temperature", tau_s, "number or a tensor")
    tau_t = check.positive("teacher_temperature", tau_t, "number or a tensor")
    beta, target_weight = check.divergence_weights(divergence, beta, target_weight)
    softcap = 0.0 if softcap is None else check.positive("softcap", softcap)
    return Options(
        tau_s, tau_t, 0.0 if no_labels else float(alpha), float(label_smoothing), ignore_index, DIVERGENCES[divergence],
        SCALES[scale], beta, target_weight, softcap, check.positive("logit_scale", logit_scale),
    )  # fmt: skip


_cached_options = functools.lru_cache(maxsize=256, typed=True)(_options_once)


def _options(*numbers) -> Options:
    """A training loop asks for the same again and again: at 128 x 10 these checks would be a tenth of the step."""
    try:
        return _cached_options(*numbers)
    except TypeError:  # something that cannot be a key; the checks say what is wrong with it
        return _options_once(*numbers)


def plain_losses(students, teachers, labels, numbers: tuple, reduction: str) -> Tensor | None:  # [exits]
    """Several plain calls of one shape, each a graph node in C++; None on a GPU, where one is not plain, or is wrong.

    Args:
        numbers: as `_options` takes them.
    """
    temperatures = numbers[:2]
    if (
        _now is None
        or reduction not in _OVER_ROWS
        or any(isinstance(tau, Tensor) for tau in temperatures)
        or check.CHECK_VALUES
        or torch.compiler.is_compiling()
    ):
        return None
    options, losses = _options(*numbers), []
    for student, teacher in zip(students, teachers, strict=True):
        loss = _now(student, teacher, labels, options, _OVER_ROWS[reduction], False)
        if loss is None or student.shape != students[0].shape:
            return None
        losses.append(loss)
    return torch.stack(losses)


class KDLoss(nn.Module):
    """`kd_loss` as a module: its keyword arguments are given once.

    Example:
        >>> criterion = KDLoss(alpha=0.1, student_temperature=4.0)
        >>> criterion(torch.randn(8, 10), torch.randn(8, 10), torch.randint(10, (8,))).shape
        torch.Size([])
    """

    def __init__(self, **options):
        super().__init__()
        unknown = set(options) - set(kd_loss.__kwdefaults__)
        if unknown:
            raise TypeError(
                f"KDLoss takes the keyword arguments of kd_loss ({', '.join(kd_loss.__kwdefaults__)}), "
                f"got {', '.join(sorted(unknown))}."
            )
        self.options = options

    def forward(
        self,
        student_logits: Tensor,  # [..., classes]
        teacher_logits: Tensor,  # [..., classes]
        labels: Tensor | None = None,  # [...] or [..., classes]
    ) -> Tensor:
        return kd_loss(student_logits, teacher_logits, labels, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())

"""The checks of what users pass: each failure is one sentence saying what was expected, what came, the way out.

Shapes, types and ranges of numbers are always checked. What lies in a tensor is looked at only where that costs
nothing: on the CPU after the fact (a bad label or a NaN teacher shows in the loss), on a GPU only when
KDFAST_CHECK_VALUES=1, because reading a value back makes the device wait.
"""

import math
import os

import torch
from torch import Tensor

from kdfast.ops._door import in_transform
from kdfast.reference.kd_kl import accumulate_dtype

CHECK_VALUES = os.environ.get("KDFAST_CHECK_VALUES", "0") not in ("", "0")


def _shape(x: Tensor) -> str:
    return "[" + ", ".join(map(str, x.shape)) + "]"


def logits(student: Tensor, teacher: Tensor) -> None:
    for name, x in (("student_logits", student), ("teacher_logits", teacher)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor [..., classes], got {type(x).__name__}.")
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point logits, got {x.dtype}; call .float() on them first.")
    if student.shape != teacher.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have the same shape [..., classes], got {_shape(student)} "
            f"and {_shape(teacher)}; select or project the classes they share first."
        )
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(f"student_logits must be [..., classes] with at least one class, got {_shape(student)}.")
    if student.device != teacher.device:
        raise ValueError(
            f"student_logits and teacher_logits must be on one device, got {student.device} and {teacher.device}; "
            "move one with .to(device)."
        )


def choice(name: str, value: str, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def fraction(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number in [0, 1], got {type(value).__name__}.")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}.")


def positive(name: str, value: float, what: str = "number") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a positive {what}, got {type(value).__name__}.")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}.")
    return float(value)


def divergence_weights(divergence: str, beta: float | None, target_weight: float) -> tuple[float, float]:
    """(beta, target_weight), beta's default filled in; given for a divergence that has none, they are a mistake."""
    for name, value in (("beta", 0.0 if beta is None else beta), ("target_weight", target_weight)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value}.")
    if divergence not in ("jsd", "dkd") and beta is not None:
        raise ValueError(f"beta belongs to divergence='jsd' and 'dkd', got divergence={divergence!r}; leave it out.")
    if divergence != "dkd" and target_weight != 1:
        raise ValueError(f"target_weight belongs to divergence='dkd', got divergence={divergence!r}; leave it out.")
    if divergence == "jsd" and beta is not None and not 0 < beta < 1:
        raise ValueError(
            f"beta must lie strictly between 0 and 1 for divergence='jsd', got {beta}; at its ends use 'forward_kl' "
            "(0) or 'reverse_kl' (1)."
        )
    return (8.0 if divergence == "dkd" else 0.5) if beta is None else float(beta), float(target_weight)


def class_indices(labels: Tensor | None, logits: Tensor) -> None:
    if labels is None or labels.is_floating_point():
        came = "none" if labels is None else "probabilities; pass labels.argmax(-1)"
        rows = ", ".join(map(str, logits.shape[:-1]))
        raise ValueError(f"divergence='dkd' needs labels as class indices [{rows}], for alpha=0 too, got {came}.")


def temperature(name: str, value: float | Tensor, logits: Tensor) -> tuple[float, Tensor | None]:
    """(the number, None), or (1.0, the tensor as [1] or [rows])."""
    if not isinstance(value, Tensor):
        return positive(name, value, "number or a tensor"), None
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {value.dtype}; pass {name}.float().")
    if value.device != logits.device:
        raise ValueError(
            f"{name} must be on the logits' device {logits.device}, got {value.device}; move it with .to(device)."
        )
    if value.numel() != 1 and value.shape not in (logits.shape[:-1], (*logits.shape[:-1], 1)):
        raise ValueError(
            f"{name} must hold one value or one a row [{', '.join(map(str, logits.shape[:-1]))}], got {_shape(value)}."
        )
    if _readable(value) and not bool((value > 0).all()):
        raise ValueError(f"{name} must be positive, got a smallest value of {value.min().item()}.")
    value = value.reshape(-1)
    dtype = accumulate_dtype(logits.dtype)
    return 1.0, value if value.dtype == dtype else value.to(dtype)


def labels(labels: Tensor | None, logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(class indices, None) or (None, probabilities)."""
    if labels is None:
        return None, None
    if not isinstance(labels, Tensor):
        out = "; temperatures go by name: student_temperature=4.0" if isinstance(labels, (int, float)) else ""
        came = type(labels).__name__
        raise TypeError(f"labels must be a tensor of class indices or probabilities, got {came}{out}.")
    if labels.device != logits.device:
        raise ValueError(
            f"labels must be on the logits' device {logits.device}, got {labels.device}; move them with .to(device)."
        )
    if labels.is_floating_point():
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels given as probabilities must have the logits' shape {_shape(logits)}, got {_shape(labels)}"
                f"{'; class indices are integers: pass labels.long()' if labels.dim() < logits.dim() else ''}."
            )
        if labels.requires_grad:
            raise ValueError("labels have no gradient here; pass labels.detach(), or learn them as teacher_logits.")
        return None, labels.to(accumulate_dtype(logits.dtype))
    if labels.dtype == torch.bool or labels.is_complex():
        raise TypeError(f"labels must be integer class indices or floating point probabilities, got {labels.dtype}.")
    if labels.shape != logits.shape[:-1]:
        out = ""
        if labels.shape == logits.shape:
            out = "; one-hot labels are probabilities: pass labels.float()"
        elif labels.shape == logits.shape[:1] + logits.shape[2:]:  # cross_entropy's order
            out = "; classes come last here: pass student_logits.movedim(1, -1), the teacher's likewise"
        rows = ", ".join(map(str, logits.shape[:-1]))
        raise ValueError(f"labels given as class indices must be [{rows}], got {_shape(labels)}{out}.")
    return labels if labels.dtype == torch.int64 else labels.to(torch.int64), None


def row_weight(weight: Tensor, logits: Tensor) -> Tensor:
    if not isinstance(weight, Tensor) or weight.shape != logits.shape[:-1]:
        came = _shape(weight) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight must hold one value a row [{', '.join(map(str, logits.shape[:-1]))}], got {came}.")
    if weight.device != logits.device:
        raise ValueError(
            f"weight must be on the logits' device {logits.device}, got {weight.device}; move it with .to(device)."
        )
    return weight.reshape(-1).to(accumulate_dtype(logits.dtype))


def count(indices: Tensor, ignore_index: int):
    """How many rows count, at least 1: a number where it can be read at once, else a tensor."""
    counted = (indices != ignore_index).sum()
    return max(int(counted), 1) if _readable(indices) else counted.clamp(min=1)


def values(student: Tensor, teacher: Tensor, indices: Tensor | None, ignore_index: int) -> None:
    """The opt-in look into device tensors, before any kernel runs."""
    if CHECK_VALUES and _waits(student):
        _teacher(teacher, indices, ignore_index)
        _labels(indices, ignore_index, student.shape[-1])


def result(loss: Tensor, teacher: Tensor, indices: Tensor | None, ignore_index: int, classes: int) -> None:
    """On the CPU a NaN loss is traced to its cause; kernels give NaN for a label out of range."""
    if not _readable(loss):
        return
    total = loss.item() if loss.dim() == 0 else loss.detach().sum().item()
    if total != total:
        _labels(indices, ignore_index, classes)
        _teacher(teacher, indices, ignore_index)


def results(losses: Tensor, teachers: list[Tensor], indices: Tensor | None, ignore_index: int, classes: int) -> None:
    """`result` of several exits' losses [exits], looked at together."""
    if _readable(losses) and math.isnan(losses.detach().sum().item()):
        for loss, teacher in zip(losses, teachers, strict=True):
            result(loss, teacher, indices, ignore_index, classes)


def label_range(loss: Tensor, indices: Tensor | None, ignore_index: int, classes: int) -> None:
    """For kernels that give NaN for a label out of range: looks for one where the loss is NaN (on a GPU: opt-in)."""
    if _readable(loss):
        looks = math.isnan(loss.detach().sum().item())
    else:
        looks = CHECK_VALUES and not torch.compiler.is_compiling() and not in_transform()
    if looks:
        _labels(indices, ignore_index, classes)


def _labels(indices: Tensor | None, ignore_index: int, classes: int) -> None:
    if indices is None:
        return
    bad = (indices != ignore_index) & ((indices < 0) | (indices >= classes))
    if bool(bad.any()):
        raise ValueError(
            f"labels must be in [0, {classes}) or ignore_index ({ignore_index}), got {indices[bad][0].item()}."
        )


def _teacher(teacher: Tensor, indices: Tensor | None, ignore_index: int) -> None:
    bad = teacher.isnan().any(-1).reshape(-1)
    if indices is not None:
        bad = bad & (indices.reshape(-1) != ignore_index)
    if bool(bad.any()):
        raise ValueError(
            f"teacher_logits hold NaN (first in row {bad.nonzero()[0].item()}); check the teacher's weights, its "
            "inputs, or its half-precision range."
        )


def _readable(x: Tensor) -> bool:
    """Whether a value can be read at no cost: a plain CPU tensor, in eager code outside torch.func."""
    return x.is_cpu and _eager()


def _waits(x: Tensor) -> bool:
    """Whether a value can be read, but only by waiting for the device."""
    return not x.is_cpu and _eager()


def _eager() -> bool:
    return not torch.compiler.is_compiling() and not in_transform()

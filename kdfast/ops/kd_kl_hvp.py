"""kd_kl_hvp: the Hessian of kd_kl's row losses times a direction, in one kernel. Formulas: docs/math/kd_kl_hvp.md.

    reads s, t and the directions given, writes the products wanted; nothing else of size [rows, classes]

The kernels know forward_kl, reverse_kl and soft_ce of plain logits. Whatever else there is, and every call of which a
further derivative may be asked, is the composed kd_kl_hvp of kdfast/reference/kd_kl.py, which PyTorch differentiates.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kdfast.ops._door import in_transform
from kdfast.reference.kd_kl import SOFT_CE, Options, accumulate_dtype
from kdfast.reference.kd_kl import kd_kl_hvp as reference

_OPTIONS = ", ".join(f"{kind.__name__} {name}" for name, kind in Options.__annotations__.items())
LIB = torch.library.Library("kdfast", "FRAGMENT")
LIB.define(
    "kd_kl_hvp(Tensor student, Tensor teacher, Tensor? student_temperature, Tensor? teacher_temperature, "
    "Tensor? labels, Tensor? target, Tensor? weight, Tensor? w_student, Tensor? w_teacher, Tensor? w_tau_s, "
    f"Tensor? w_tau_t, {_OPTIONS}, bool student_wanted, bool teacher_wanted) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _reference(*args):
    *inputs, student_wanted, teacher_wanted = args
    tensors, direction, options = inputs[:7], inputs[7:11], Options(*inputs[11:])
    product = reference(*tensors, options, direction=tuple(direction))
    wanted = (student_wanted, teacher_wanted, tensors[2] is not None, tensors[3] is not None)
    dtypes = (tensors[0].dtype,) * 2 + (accumulate_dtype(tensors[0].dtype),) * 2
    return tuple(
        h.to(dtype, copy=True) if keep else h.new_empty(0, dtype=dtype)
        for h, keep, dtype in zip(product, wanted, dtypes, strict=True)
    )


def _fake(student, teacher, student_temperature, teacher_temperature, *args):
    rows, dtype = student.shape[0], accumulate_dtype(student.dtype)
    return (
        *(student.new_empty(student.shape if wanted else (0,)) for wanted in args[-2:]),
        student.new_empty(0 if student_temperature is None else rows, dtype=dtype),
        student.new_empty(0 if teacher_temperature is None else rows, dtype=dtype),
    )


LIB.impl("kd_kl_hvp", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("kdfast::kd_kl_hvp", _fake, lib=LIB)
_HVP = torch.ops.kdfast.kd_kl_hvp.default


def kd_kl_hvp(
    student: Tensor,  # [rows, classes]
    teacher: Tensor,  # [rows, classes], same dtype
    student_temperature: Tensor | None,  # [1] or [rows], of accumulate_dtype
    teacher_temperature: Tensor | None,  # [1] or [rows], of accumulate_dtype
    labels: Tensor | None,  # [rows] int64
    target: Tensor | None,  # [rows, classes], of accumulate_dtype
    weight: Tensor | None,  # [rows], of accumulate_dtype
    options: Options,
    direction: tuple[Tensor | None, ...],  # each as the (student, teacher, temperature, temperature) it belongs to
    wanted: tuple[bool, ...] = (True,) * 4,
    inner: bool = False,
) -> list[Tensor | None]:  # the products with the Hessian, per row for the temperatures; None where not wanted
    """H times `direction`, each row by itself, in the logits' dtype. `inner`: called from a jvp, where the tangents of
    the inputs are the direction itself."""
    tensors = (student, teacher, student_temperature, teacher_temperature, labels, target, weight)
    last = is_last((*tensors, *direction), inner)
    arguments = [x if x is None else in_memory(x).contiguous() for x in (*tensors, *direction)]
    if _known(options) and last:
        with torch._C._AutoDispatchBelowAutograd():
            product = _HVP(*arguments, *options, wanted[0], wanted[1])
    else:
        product = reference(*arguments[:7], options, direction=tuple(arguments[7:]))
        product = [h.to(x.dtype) for h, x in zip(product, (student, teacher, product[2], product[3]), strict=True)]
    given = (True, True, student_temperature is not None, teacher_temperature is not None)
    return [h if w and g else None for h, w, g in zip(product, wanted, given, strict=True)]


def _known(options: Options) -> bool:
    """Whether the kernels have this loss."""
    return options.divergence <= SOFT_CE and options.softcap == 0 and options.logit_scale == 1


def is_last(tensors, inner: bool = False) -> bool:
    """Whether nobody can ask for a derivative of what is computed from these tensors now."""
    if torch.compiler.is_compiling() or in_transform():
        return False
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return False
    if inner or forward_ad._current_level < 0:
        return True
    return all(x is None or forward_ad.unpack_dual(x).tangent is None for x in tensors)


def in_memory(x: Tensor) -> Tensor:
    """The tensor a kernel may read. One saved inside a torch.func transform and read after its end is still wrapped,
    and the zeros that autograd makes for an absent tangent have no memory."""
    if torch.compiler.is_compiling():
        return x
    x = torch._C._functorch.unwrap_if_dead(x)
    return torch.zeros_like(x) if x._is_zerotensor() else x

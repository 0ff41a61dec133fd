"""pathway_loss: weighted distances between many pairs of feature maps, in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdfast.losses import _checks as check
from kdfast.ops import pathways as ops
from kdfast.reference.kd_kl import accumulate_dtype
from kdfast.reference.pathways import ATTENTION, DISTANCES, RESIZES


def pathway_loss(
    students: Sequence[Tensor],  # of [batch_p, channels_p, h_p, w_p]
    teachers: Sequence[Tensor],  # of [batch_p, channels_p, height_p, width_p]
    weights: Tensor | Sequence[float] | None = None,  # [pathways]
    *,
    distance: str = "hcl",
    resize: str = "nearest",
    keep: Tensor | Sequence[bool] | Sequence[int] | None = None,  # [pathways] bool, or indices
) -> Tensor:  # scalar
    """How far each student's feature map is from its teacher's, weighted and summed::

        loss = sum_p weights_p * distance(resize(students_p), teachers_p)

    Gradients flow to students, teachers and weights (whose gradient is `pathway_distances`); second order and forward
    mode are exact. One map may stand in the lists many times (each student feature against each teacher feature).

    Args:
        students: feature maps, floating point. Contiguous and channels_last maps are read as they lie.
        teachers: one for each student, with its batch size and (but for "attention") its channels. Give them detached
            unless they should learn too.
        weights: one factor a pathway; ``None`` means ones.
        distance: ``"hcl"`` (hierarchical context loss: mean squared difference at full resolution and of 4x4, 2x2 and
            1x1 average pools, weighted 1, 1/2, 1/4, 1/8 and divided by the weights' sum), ``"mse"``, ``"l1"`` (means),
            or ``"attention"`` (mean squared difference of the normalised maps of squares summed over channels).
        resize: how a student's map of another height or width takes its teacher's: ``"nearest"`` or ``"bilinear"``, as
            `torch.nn.functional.interpolate` has them.
        keep: the pathways to compute, as one bool each or as indices. A dropped one counts as distance 0 and its maps
            are not read. Given as a tensor of bools on a GPU, that is decided there, without waiting for the device.

    Returns:
        A scalar, fp32, or fp64 for fp64 maps.

    Raises:
        TypeError, ValueError: one sentence saying what was expected and what came.

    Source: Deng et al., "DistPro", ECCV 2022 (arXiv:2204.05547), equation 2; "hcl" is of Chen et al., 2021
    (arXiv:2104.09044), "attention" of Zagoruyko and Komodakis, 2017 (arXiv:1612.03928).

    Example:
        >>> students = [torch.randn(8, 16, 32, 32, requires_grad=True), torch.randn(8, 32, 8, 8, requires_grad=True)]
        >>> teachers = [torch.randn(8, 16, 32, 32), torch.randn(8, 32, 16, 16)]
        >>> loss = pathway_loss(students, teachers, torch.tensor([0.7, 0.3]))
        >>> loss.backward()
    """
    students, teachers, options = _checked(students, teachers, distance, resize)
    weights = _weights(weights, students)
    kept, keep = _keep(keep, students[0], len(students))
    if kept is not None:
        if not kept:  # still part of the graph, so that backward() finds its way
            return students[0][:0].sum().to(weights.dtype) + (0 * weights).sum()
        students, teachers = [students[p] for p in kept], [teachers[p] for p in kept]
        weights = torch.stack([weights[p] for p in kept])  # a list as index would be copied to the device
    return ops.weighted_sum(students, teachers, weights, keep, *options)


def pathway_distances(
    students: Sequence[Tensor],  # of [batch_p, channels_p, h_p, w_p]
    teachers: Sequence[Tensor],  # of [batch_p, channels_p, height_p, width_p]
    *,
    distance: str = "hcl",
    resize: str = "nearest",
    keep: Tensor | Sequence[bool] | Sequence[int] | None = None,  # [pathways] bool, or indices
) -> Tensor:  # [pathways]
    """The distance of each pathway: `pathway_loss` before it is weighted and summed.

    Args:
        students: see `pathway_loss`, and so for all that follow.
        teachers: the same.
        distance: the same.
        resize: the same.
        keep: the same; the distance of a dropped pathway is 0.

    Returns:
        ``[pathways]``, fp32, or fp64 for fp64 maps.

    Example:
        >>> maps = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)]
        >>> pathway_distances(maps, maps).tolist()
        [0.0, 0.0]
    """
    students, teachers, options = _checked(students, teachers, distance, resize)
    kept, keep = _keep(keep, students[0], len(students))
    if kept is None:
        return ops.pathways(students, teachers, keep, *options)
    nothing = students[0].new_zeros(len(students), dtype=accumulate_dtype(students[0].dtype))
    if not kept:
        return nothing + students[0][:0].sum().to(nothing.dtype)
    distances = ops.pathways([students[p] for p in kept], [teachers[p] for p in kept], keep, *options)
    found = dict(zip(kept, distances.unbind(), strict=True))
    return torch.stack([found.get(p, nothing[p]) for p in range(len(students))])


def hcl(
    student_features: Sequence[Tensor],  # of [batch, channels_i, height_i, width_i]
    teacher_features: Sequence[Tensor],  # of the same but for height and width
) -> Tensor:  # scalar
    """The hierarchical context loss summed over pairs of feature maps, under the name and with the arguments of
    ReviewKD's published code.

    Args:
        student_features: feature maps of the student.
        teacher_features: of the teacher, one for each; a student's map of another size is resized to it.

    Returns:
        A scalar.

    Source: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021 (arXiv:2104.09044).

    Example:
        >>> features = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)]
        >>> hcl(features, features).item()
        0.0
    """
    return pathway_loss(student_features, teacher_features)


# ---------------------------------------------------------------- checks
def _checked(students, teachers, distance: str, resize: str):
    """(students, teachers, (distance, resize) as the op takes them), all maps of one dtype."""
    check.choice("distance", distance, DISTANCES)
    check.choice("resize", resize, RESIZES)
    for name, maps in (("students", students), ("teachers", teachers)):
        if isinstance(maps, Tensor) or not isinstance(maps, Sequence):
            raise TypeError(f"{name} must be a list of feature maps, got {type(maps).__name__}; put it in a list.")
    if len(students) != len(teachers) or not students:
        raise ValueError(
            f"students and teachers must be lists of the same length, at least 1, got {len(students)} and "
            f"{len(teachers)}; repeat a map for each pathway it takes part in."
        )
    for p, (a, b) in enumerate(zip(students, teachers, strict=True)):
        for name, x in (("students", a), ("teachers", b)):
            if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point() or 0 in x.shape[1:]:
                came = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise (ValueError if isinstance(x, Tensor) else TypeError)(
                    f"{name}[{p}] must be a floating point map [batch, channels, height, width], got {came}."
                )
            if x.device != students[0].device:
                raise ValueError(
                    f"All maps must be on one device, got {x.device} for {name}[{p}] and {students[0].device} for "
                    "students[0]; move one with .to(device)."
                )
        if a.shape[0] != b.shape[0] or (a.shape[1] != b.shape[1] and DISTANCES[distance] != ATTENTION):
            same = "batch size" if DISTANCES[distance] == ATTENTION else "batch size and channels"
            raise ValueError(
                f"students[{p}] and teachers[{p}] must have the same {same}, got {list(a.shape)} and {list(b.shape)}; "
                "project the student's channels first."
            )
    dtypes = {x.dtype for maps in (students, teachers) for x in maps}
    if len(dtypes) > 1:
        widest = students[0].dtype
        for dtype in dtypes:
            widest = torch.promote_types(widest, dtype)
        students, teachers = (ops.each_once(lambda x: x.to(widest), maps) for maps in (students, teachers))
    return list(students), list(teachers), (DISTANCES[distance], RESIZES[resize])


def _weights(weights, students: list[Tensor]) -> Tensor:  # [pathways]
    count, dtype = len(students), accumulate_dtype(students[0].dtype)
    if weights is None:
        return torch.ones(count, dtype=dtype, device=students[0].device)
    if not isinstance(weights, Tensor):
        try:
            numbers = torch.tensor(weights, dtype=dtype)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"weights must hold one number a pathway [{count}], got {weights!r}.") from error
        weights, device = numbers, students[0].device
        if device.type != "cpu" and numbers.shape == (count,):  # filled there: a copy would be waited for
            weights = torch.stack([torch.full((), x, dtype=dtype, device=device) for x in numbers.tolist()])
    if weights.shape != (count,) or not weights.is_floating_point():
        raise ValueError(
            f"weights must hold one number a pathway [{count}], got {weights.dtype} {list(weights.shape)}."
        )
    if weights.device != students[0].device:
        raise ValueError(
            f"weights must be on the maps' device {students[0].device}, got {weights.device}; move them with "
            ".to(device)."
        )
    return weights.to(dtype)


def _keep(keep, like: Tensor, count: int) -> tuple[list[int] | None, Tensor | None]:
    """(the pathways kept, where that is known here; else what the kernel is given)."""
    if keep is None:
        return None, None
    if isinstance(keep, Tensor):
        if keep.dtype != torch.bool or keep.shape != (count,):
            raise ValueError(f"keep must be one bool a pathway [{count}], got {keep.dtype} {list(keep.shape)}.")
        if keep.device != like.device:
            raise ValueError(f"keep must be on the maps' device {like.device}, got {keep.device}.")
        if not check._readable(keep):
            return None, keep
        keep = keep.tolist()
    keep = list(keep)
    if any(isinstance(k, bool) for k in keep):
        if len(keep) != count or not all(isinstance(k, bool) for k in keep):
            raise ValueError(f"keep must be one bool a pathway, {count} in all, or indices, got {keep}.")
        return [p for p in range(count) if keep[p]], None
    if not all(isinstance(k, int) and 0 <= k < count for k in keep) or len(set(keep)) != len(keep):
        raise ValueError(f"keep must be different indices in [0, {count}), or one bool a pathway, got {keep}.")
    return keep, None

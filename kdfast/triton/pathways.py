"""pathways in Triton: distances of pairs of feature maps, and gradients. The definition: kdfast/reference/pathways.py.

    mse: mean d^2    l1: mean |d|    hcl: [mean d^2 + sum_l w_l mean_windows (mean_window d)^2] / (1 + sum_l w_l)
    d = resized student - teacher; attention stands in pathways_attention.py

Fused for mse, l1 and hcl: resizing, difference, pooling and gradient; a program has some planes, whole rows of them at
a time. Windows are sums over rows first, then over columns, so that a pixel is touched once a window of rows (7 in
all), not once a window (21). Planes of more rows than a tile holds are swept twice for a gradient, the second time
from cache.

One launch a pathway, not one for all: the tile, its mask of windows and whether there is resizing are constants of the
compiled program, and a table of pointers would be a copy from the host, which a CUDA graph does not allow. A dropped
pathway's programs end (or write zeros) before they read. Partial sums are added by one `sum` in a fixed order.

Memory for a pair of n elements of b bytes: forward reads 2 n b, backward reads 2 n b and writes n b. The
gradient in a resized student goes through a map of the teacher's size, written and read once more (_resize.py).
16-bit types are storage only, cast right after their load.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.reference.kd_kl import accumulate_dtype
from kdfast.reference.pathways import ATTENTION, BILINEAR, HCL, level_shares
from kdfast.triton._resize import SIZES, arithmetic, gather, load_resized, scales
from kdfast.triton.kd_kl import _device
from kdfast.triton.pathways_attention import attention

L1_CODE = tl.constexpr(1)
TILE = 2048  # elements a program holds, 8 a thread; of fp64 half


# ---------------------------------------------------------------- windows
@triton.jit
def _in_window(at, i, size, LEVEL: tl.constexpr):
    return (at >= i * size // LEVEL) & (at < ((i + 1) * size + LEVEL - 1) // LEVEL)


@triton.jit
def _columns(rows_sum, i, x, height, width, unit, coefficient, TOP: tl.constexpr, LEVEL: tl.constexpr):
    """Row i of the level's windows, given the sums over its rows [planes, width]: (their part of the distance, by
    plane; what they add to the gradient of a pixel, by column [planes, width])."""
    value = tl.sum(rows_sum * 0.0, 1)
    added = rows_sum * 0.0
    weight = unit * (1.0 / (2.0 * TOP * LEVEL))  # 1/2, 1/4, 1/8, over the windows of the level
    rows = ((i + 1) * height + LEVEL - 1) // LEVEL - i * height // LEVEL
    for j in range(LEVEL):  # no constant, or the compiler would hold all windows at once
        inside = _in_window(x, j, width, LEVEL)[None, :]
        area = rows * (((j + 1) * width + LEVEL - 1) // LEVEL - j * width // LEVEL)
        mean = tl.sum(tl.where(inside, rows_sum, 0.0), 1) / area.to(rows_sum.dtype)
        value += weight * mean * mean
        added += tl.where(inside, (2.0 * coefficient * weight * mean / area.to(rows_sum.dtype))[:, None], 0.0)
    return value, added


@triton.jit
def _level(d, g, value, y, x, height, width, unit, coefficient, TOP: tl.constexpr, LEVEL: tl.constexpr):
    """A level of a tile of whole planes, added to its gradient and its value."""
    for i in range(LEVEL):
        inside = _in_window(y, i, height, LEVEL)[None, :, None]
        sums = tl.sum(tl.where(inside, d, 0.0), 1)
        v, added = _columns(sums, i, x, height, width, unit, coefficient, TOP, LEVEL)
        value += v
        g += tl.where(inside, added[:, None, :], 0.0)
    return g, value


# ---------------------------------------------------------------- mse, l1, hcl
@triton.jit
def _difference(
    student, teacher, student_at, teacher_at, y, x, mask,
    height, width, in_height, in_width, student_y, student_x, teacher_y, teacher_x, scale_y, scale_x,
    RESIZED: tl.constexpr, BILINEAR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row, column = y[None, :, None], x[None, None, :]
    a = load_resized(
        student, student_at, row, column, mask,
        student_y, student_x, in_height, in_width, height, width, scale_y, scale_x, RESIZED, BILINEAR, ACC,
    )  # fmt: skip
    b = tl.load(teacher + teacher_at + row * teacher_y + column * teacher_x, mask=mask, other=0.0).to(ACC)
    return tl.where(mask, a - b, 0.0)


@triton.jit
def _term(d, DISTANCE: tl.constexpr):
    return tl.abs(d) if DISTANCE == L1_CODE else d * d


@triton.jit
def _slope(d, DISTANCE: tl.constexpr):
    if DISTANCE == L1_CODE:
        return tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, 0.0)).to(d.dtype)
    return 2.0 * d


@triton.jit
def _store(
    g, student_grad, teacher_grad, resized_grad, plane, student_at, teacher_at, y, x, inside, kept,
    height, width, student_y, student_x, teacher_y, teacher_x,
):  # fmt: skip
    row, column = y[None, :, None], x[None, None, :]
    g = tl.where(kept, g, 0.0)
    if student_grad is not None:
        to = student_grad + student_at + row * student_y + column * student_x
        tl.store(to, g.to(student_grad.dtype.element_ty), mask=inside)
    if resized_grad is not None:
        tl.store(resized_grad + (plane[:, None, None] * height + row) * width + column, g, mask=inside)
    if teacher_grad is not None:
        to = teacher_grad + teacher_at + row * teacher_y + column * teacher_x
        tl.store(to, (-g).to(teacher_grad.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["planes", *SIZES])
def pixels_kernel(
    student, teacher,  # [samples, channels, in_height, in_width], [samples, channels, height, width]
    student_grad, teacher_grad, resized_grad,  # the same shapes, [planes, height, width], or None
    partials,  # [programs], or None
    keep,  # [1], or None
    coefficients,  # [1], or None
    planes, channels, height, width, in_height, in_width,
    student_n, student_c, student_y, student_x, teacher_n, teacher_c, teacher_y, teacher_x,
    scale_y, scale_x, unit: tl.float64, pixel_unit: tl.float64,
    DISTANCE: tl.constexpr, TOP: tl.constexpr, RESIZED: tl.constexpr, BILINEAR: tl.constexpr, WHOLE: tl.constexpr,
    ACC: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """unit: 1 / (planes of the whole map * total weight of the levels), pixel_unit: that over height * width.
    WHOLE: a tile holds all rows of its planes; d then stays, and every pixel is read once."""
    GRADIENT: tl.constexpr = coefficients is not None
    kept = True
    if keep is not None:
        kept = tl.load(keep).to(tl.int1)
        if not GRADIENT:  # noqa: SIM102  (one is known when compiling)
            if not kept:
                return
    plane = tl.program_id(0) * PLANES + tl.arange(0, PLANES)
    exists = plane < planes
    sample, channel = (plane // channels).to(tl.int64), (plane % channels).to(tl.int64)
    plane = plane.to(tl.int64)
    student_at = (sample * student_n + channel * student_c)[:, None, None]
    teacher_at = (sample * teacher_n + channel * teacher_c)[:, None, None]
    x = tl.arange(0, COLS)
    nothing = tl.zeros([PLANES], ACC)
    scaled = (tl.zeros([PLANES], tl.float64) + unit).to(ACC)
    pixel = (tl.zeros([PLANES], tl.float64) + pixel_unit).to(ACC)
    coefficient = nothing
    if GRADIENT:
        coefficient = tl.where(kept, tl.load(coefficients).to(ACC), 0.0) + nothing
    factor = (coefficient * pixel)[:, None, None]
    columns_exist = exists[:, None, None] & (x < width)[None, None, :]

    if WHOLE:
        y = tl.arange(0, ROWS)
        inside = columns_exist & (y < height)[None, :, None]
        d = _difference(
            student, teacher, student_at, teacher_at, y, x, inside & kept,
            height, width, in_height, in_width, student_y, student_x, teacher_y, teacher_x, scale_y, scale_x,
            RESIZED, BILINEAR, ACC,
        )  # fmt: skip
        value = pixel * tl.sum(tl.sum(_term(d, DISTANCE), 2), 1)
        g = factor * _slope(d, DISTANCE)
        if TOP > 2:
            g, value = _level(d, g, value, y, x, height, width, scaled, coefficient, TOP, 4)
        if TOP > 1:
            g, value = _level(d, g, value, y, x, height, width, scaled, coefficient, TOP, 2)
        if TOP > 0:
            g, value = _level(d, g, value, y, x, height, width, scaled, coefficient, TOP, 1)
        if GRADIENT:
            _store(
                g, student_grad, teacher_grad, resized_grad, plane, student_at, teacher_at, y, x, inside, kept,
                height, width, student_y, student_x, teacher_y, teacher_x,
            )  # fmt: skip
        if partials is not None:
            tl.store(partials + tl.program_id(0), tl.sum(value, 0))
    else:
        value = nothing
        sums_40, sums_41 = tl.zeros([PLANES, COLS], ACC), tl.zeros([PLANES, COLS], ACC)
        sums_42, sums_43 = tl.zeros([PLANES, COLS], ACC), tl.zeros([PLANES, COLS], ACC)
        sums_20, sums_21 = tl.zeros([PLANES, COLS], ACC), tl.zeros([PLANES, COLS], ACC)
        sums_10 = tl.zeros([PLANES, COLS], ACC)
        if partials is not None or TOP > 0:
            for begin in range(0, height, ROWS):
                y = begin + tl.arange(0, ROWS)
                inside = columns_exist & (y < height)[None, :, None]
                d = _difference(
                    student, teacher, student_at, teacher_at, y, x, inside & kept,
                    height, width, in_height, in_width, student_y, student_x, teacher_y, teacher_x, scale_y, scale_x,
                    RESIZED, BILINEAR, ACC,
                )  # fmt: skip
                value += pixel * tl.sum(tl.sum(_term(d, DISTANCE), 2), 1)
                if TOP > 0:  # 4, as planes of few rows are whole
                    row = y[None, :, None]
                    sums_10 += tl.sum(d, 1)
                    sums_20 += tl.sum(tl.where(_in_window(row, 0, height, 2), d, 0.0), 1)
                    sums_21 += tl.sum(tl.where(_in_window(row, 1, height, 2), d, 0.0), 1)
                    sums_40 += tl.sum(tl.where(_in_window(row, 0, height, 4), d, 0.0), 1)
                    sums_41 += tl.sum(tl.where(_in_window(row, 1, height, 4), d, 0.0), 1)
                    sums_42 += tl.sum(tl.where(_in_window(row, 2, height, 4), d, 0.0), 1)
                    sums_43 += tl.sum(tl.where(_in_window(row, 3, height, 4), d, 0.0), 1)
        if TOP > 0:
            value_10, added_10 = _columns(sums_10, 0, x, height, width, scaled, coefficient, TOP, 1)
            value_20, added_20 = _columns(sums_20, 0, x, height, width, scaled, coefficient, TOP, 2)
            value_21, added_21 = _columns(sums_21, 1, x, height, width, scaled, coefficient, TOP, 2)
            value_40, added_40 = _columns(sums_40, 0, x, height, width, scaled, coefficient, TOP, 4)
            value_41, added_41 = _columns(sums_41, 1, x, height, width, scaled, coefficient, TOP, 4)
            value_42, added_42 = _columns(sums_42, 2, x, height, width, scaled, coefficient, TOP, 4)
            value_43, added_43 = _columns(sums_43, 3, x, height, width, scaled, coefficient, TOP, 4)
            value += value_10 + (value_20 + value_21) + ((value_40 + value_41) + (value_42 + value_43))
        if partials is not None:
            tl.store(partials + tl.program_id(0), tl.sum(value, 0))
        if GRADIENT:
            for begin in range(0, height, ROWS):
                y = begin + tl.arange(0, ROWS)
                inside = columns_exist & (y < height)[None, :, None]
                d = _difference(
                    student, teacher, student_at, teacher_at, y, x, inside & kept,
                    height, width, in_height, in_width, student_y, student_x, teacher_y, teacher_x, scale_y, scale_x,
                    RESIZED, BILINEAR, ACC,
                )  # fmt: skip
                g = factor * _slope(d, DISTANCE)
                if TOP > 0:
                    row = y[None, :, None]
                    g += added_10[:, None, :]
                    g += tl.where(_in_window(row, 0, height, 2), added_20[:, None, :], 0.0)
                    g += tl.where(_in_window(row, 1, height, 2), added_21[:, None, :], 0.0)
                    g += tl.where(_in_window(row, 0, height, 4), added_40[:, None, :], 0.0)
                    g += tl.where(_in_window(row, 1, height, 4), added_41[:, None, :], 0.0)
                    g += tl.where(_in_window(row, 2, height, 4), added_42[:, None, :], 0.0)
                    g += tl.where(_in_window(row, 3, height, 4), added_43[:, None, :], 0.0)
                _store(
                    g, student_grad, teacher_grad, resized_grad, plane, student_at, teacher_at, y, x, inside, kept,
                    height, width, student_y, student_x, teacher_y, teacher_x,
                )  # fmt: skip


# ---------------------------------------------------------------- launchers
def pathways(
    students: list[Tensor],  # of [samples, channels, in_height, in_width]
    teachers: list[Tensor],  # of [samples, channels, height, width]
    keep: Tensor | None,  # [pathways] bool
    distance: int,
    resize: int,
) -> Tensor:  # [pathways]
    """The kernel of the op of this name; its schema stands in kdfast/ops/pathways.py."""
    return _run(students, teachers, keep, distance, resize, None, True, False, False)[0]


def pathways_backward(
    grad: Tensor,  # [pathways]
    students: list[Tensor],
    teachers: list[Tensor],
    keep: Tensor | None,
    distance: int,
    resize: int,
    student_grad: bool,
    teacher_grad: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """The kernel of the op of this name."""
    return _run(students, teachers, keep, distance, resize, grad, False, student_grad, teacher_grad)[1:]


def pathways_value_and_grad(
    students: list[Tensor],
    teachers: list[Tensor],
    weights: Tensor,  # [pathways]
    keep: Tensor | None,
    distance: int,
    resize: int,
) -> tuple[Tensor, list[Tensor]]:
    """The kernel of the op of this name: distances and gradients in one launch a pathway."""
    return _run(students, teachers, keep, distance, resize, weights, True, True, False)[:2]


def _run(students, teachers, keep, distance, resize, grad, values, student_grad, teacher_grad):
    """(distances or None, gradients in the students, in the teachers)."""
    accumulate = accumulate_dtype(students[0].dtype)
    by_student = [torch.empty_like(x) for x in students] if student_grad else []
    by_teacher = [torch.empty_like(x) for x in teachers] if teacher_grad else []
    if grad is not None and not (by_student or by_teacher):
        return None, [], []
    each, plan = (attention, None) if distance == ATTENTION else (_pixels, [_tile(x, accumulate) for x in teachers])
    # Parts of each distance: a program's each, and zero where there is none.
    programs = 1 if plan is None else max(1, *(tile[0] for tile in plan))
    parts = students[0].new_zeros(len(students), programs, dtype=accumulate) if values else None
    with _device(students[0]):
        for p, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
            if student.numel() == 0 or teacher.numel() == 0:
                continue
            each(
                student, teacher, None if keep is None else keep[p : p + 1], distance, resize == BILINEAR, accumulate,
                None if grad is None else grad[p : p + 1], parts[p] if values else None,
                by_student[p] if by_student else None, by_teacher[p] if by_teacher else None,
                None if plan is None else plan[p],
            )  # fmt: skip
    return (parts.sum(1) if values else None), by_student, by_teacher


def _tile(teacher: Tensor, accumulate: torch.dtype) -> tuple[int, int, int, int]:
    """(programs, planes, rows, columns): whole rows of a plane, as many as fit; whole planes where several do."""
    samples, channels, height, width = teacher.shape
    columns = triton.next_power_of_2(max(width, 1))
    tile = TILE // 2 if accumulate == torch.float64 else TILE
    rows = max(1, min(triton.next_power_of_2(max(height, 1)), tile // columns))
    planes = max(1, tile // (rows * columns)) if rows >= height else 1
    planes = min(planes, triton.next_power_of_2(max(samples * channels, 1)), 64)
    return triton.cdiv(samples * channels, planes), planes, rows, columns


def _pixels(student, teacher, keep, distance, bilinear, accumulate, coefficient, parts, by_student, by_teacher, tile):
    """mse, l1, hcl."""
    samples, channels, height, width = teacher.shape
    levels = level_shares(height) if distance == HCL else []
    programs, planes, rows, columns = tile
    unit = 1 / (samples * channels * (1 + sum(share for _, share in levels)))
    resized = student.shape[2:] != teacher.shape[2:]
    scratch = None
    if resized and by_student is not None:
        scratch = teacher.new_empty(teacher.shape, dtype=accumulate)
    warps = max(1, min(8, planes * rows * columns // 256))
    registers = 255 if accumulate == torch.float64 else 128  # left to itself ptxas would rather spill than pass 64
    pixels_kernel[(programs,)](
        student, teacher, None if resized else by_student, by_teacher, scratch, parts, keep, coefficient,
        samples * channels, *teacher.shape[1:], *student.shape[2:], *student.stride(), *teacher.stride(),
        *scales(student, teacher), unit, unit / (height * width),
        DISTANCE=distance, TOP=levels[0][0] if levels else 0, RESIZED=resized, BILINEAR=bilinear, WHOLE=rows >= height,
        ACC=arithmetic(accumulate), PLANES=planes, ROWS=rows, COLS=columns, num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    if scratch is not None:
        gather(scratch, student, teacher, by_student, bilinear, accumulate)

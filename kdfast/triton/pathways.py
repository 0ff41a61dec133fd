"""pathways in Triton: distances of pairs of feature maps and their gradients. The definition: kdfast/reference/pathways.py.

    mse: mean d^2    l1: mean |d|    hcl: [mean d^2 + sum_l w_l mean_windows (mean_window d)^2] / (1 + sum_l w_l)
    attention: mean (A(a)/|A(a)| - A(b)/|A(b)|)^2, A(x) = sum over channels of x^2        d = resized a - b

Fused for mse, l1 and hcl: resizing, difference, pooling and gradient; a program has some planes, whole rows of them at
a time. Windows are sums over rows first, then over columns, so that a pixel is touched once a window of rows (7 in
all), not once a window (21). Planes of more rows than a tile holds are swept twice for a gradient, the second time
from cache. For attention the maps A are summed here and normalised by PyTorch: they are one channel of many.

One launch a pathway, not one for all: the tile, its mask of windows and whether there is resizing are constants of the
compiled program, and a table of pointers would be a copy from the host, which a CUDA graph does not allow. A dropped
pathway's programs end (or write zeros) before they read. Partial sums are added by one `sum` in a fixed order.

Memory for a pair of n elements of b bytes: forward reads 2 n b, backward reads 2 n b and writes n b; attention's
backward reads 4 n b. The gradient in a resized student goes through a map of the teacher's size (4 n or 8 n more
written and read). 16-bit types are storage only, cast right after their load.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.reference.kd_kl import accumulate_dtype
from kdfast.reference.pathways import ATTENTION, BILINEAR, HCL, level_shares
from kdfast.triton.kd_kl import _device

L1_CODE, HCL_CODE = tl.constexpr(1), tl.constexpr(2)
TILE = 4096  # elements a program holds; of fp64 half
SIZES = ("channels", "height", "width", "in_height", "in_width")  # few programs serve all; strides do specialise


# ---------------------------------------------------------------- resizing
@triton.jit
def _source(at, size, out, scale, BILINEAR: tl.constexpr, ACC: tl.constexpr):
    """(low, high, weight of high) of output pixels: torch.nn.functional.interpolate. Nearest rounds in fp32."""
    if BILINEAR:
        ratio = (tl.zeros(at.shape, tl.float64) + size).to(ACC) / (tl.zeros(at.shape, tl.float64) + out).to(ACC)
        inside = tl.maximum(ratio * (at.to(ACC) + 0.5) - 0.5, 0.0)
        low = tl.minimum(inside.to(tl.int32), size - 1)
        return low, tl.minimum(low + 1, size - 1), inside - low.to(ACC)
    low = tl.minimum(tl.floor(at.to(tl.float32) * scale).to(tl.int32), size - 1)
    return low, low, at.to(ACC) * 0.0


@triton.jit
def _student(
    student, base, y, x, mask,
    stride_y, stride_x, in_height, in_width, height, width, scale_y, scale_x,
    RESIZED: tl.constexpr, BILINEAR: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The student's map as the teacher's pixels (y, x) see it; `base` holds sample and channel."""
    if not RESIZED:
        return tl.load(student + base + y * stride_y + x * stride_x, mask=mask, other=0.0).to(ACC)
    y0, y1, wy = _source(y, in_height, height, scale_y, BILINEAR, ACC)
    x0, x1, wx = _source(x, in_width, width, scale_x, BILINEAR, ACC)
    corner = tl.load(student + base + y0 * stride_y + x0 * stride_x, mask=mask, other=0.0).to(ACC)
    if not BILINEAR:
        return corner
    right = tl.load(student + base + y0 * stride_y + x1 * stride_x, mask=mask, other=0.0).to(ACC)
    below = tl.load(student + base + y1 * stride_y + x0 * stride_x, mask=mask, other=0.0).to(ACC)
    across = tl.load(student + base + y1 * stride_y + x1 * stride_x, mask=mask, other=0.0).to(ACC)
    return (1.0 - wy) * ((1.0 - wx) * corner + wx * right) + wy * ((1.0 - wx) * below + wx * across)


@triton.jit
def _reads(pixel, out, size, other, scale, BILINEAR: tl.constexpr, ACC: tl.constexpr):
    """How much of an input pixel an output pixel takes."""
    low, high, weight = _source(out, size, other, scale, BILINEAR, ACC)
    return tl.where(low == pixel, 1.0 - weight, 0.0) + tl.where(high == pixel, weight, 0.0)


@triton.jit(do_not_specialize=["elements", *SIZES])
def gather_kernel(
    resized,  # [planes, height, width], gradient as the teacher's pixels see it
    student_grad,  # [samples, channels, in_height, in_width]
    elements, channels, in_height, in_width, height, width,
    stride_n, stride_c, stride_y, stride_x, scale_y, scale_x,
    REACH_Y: tl.constexpr, REACH_X: tl.constexpr,
    BILINEAR: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient in a resized student: each of its pixels sums the REACH_Y x REACH_X outputs that may read it."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < elements
    x, rest = (at % in_width).to(tl.int32), at // in_width
    y, plane = (rest % in_height).to(tl.int32), rest // in_height
    # The first reader of pixel i is at (i - 1/2) out / size - 1/2 or later, the last at (i + 3/2) out / size or before.
    first_y = (2 * y - 1) * height // (2 * in_height) - 2
    first_x = (2 * x - 1) * width // (2 * in_width) - 2
    sum = tl.zeros([TILE], ACC)
    for i in range(REACH_Y):
        row = first_y + i
        in_rows = mask & (row >= 0) & (row < height)
        by_row = _reads(y, row, in_height, height, scale_y, BILINEAR, ACC)
        for j in range(REACH_X):
            column = first_x + j
            share = by_row * _reads(x, column, in_width, width, scale_x, BILINEAR, ACC)
            inside = in_rows & (column >= 0) & (column < width) & (share != 0.0)
            sum += share * tl.load(resized + (plane * height + row) * width + column, mask=inside, other=0.0)
    to = (plane // channels) * stride_n + (plane % channels) * stride_c + y * stride_y + x * stride_x
    tl.store(student_grad + to, sum.to(student_grad.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- windows
@triton.jit
def _in_window(at, i: tl.constexpr, size, LEVEL: tl.constexpr):
    return (at >= i * size // LEVEL) & (at < ((i + 1) * size + LEVEL - 1) // LEVEL)


@triton.jit
def _extent(i: tl.constexpr, size, LEVEL: tl.constexpr):
    return ((i + 1) * size + LEVEL - 1) // LEVEL - i * size // LEVEL


@triton.jit
def _columns(rows_sum, rows, i: tl.constexpr, x, width, unit, coefficient, TOP: tl.constexpr, LEVEL: tl.constexpr):
    """A window of rows, summed over its rows [planes, width]: (its windows' part of the distance, by plane; what they
    add to the gradient of a pixel of each column [planes, width])."""
    value = tl.sum(rows_sum * 0.0, 1)
    added = rows_sum * 0.0
    weight = unit * LEVEL / (2.0 * TOP * LEVEL * LEVEL)
    for j in tl.static_range(LEVEL):
        inside = _in_window(x, j, width, LEVEL)[None, :]
        area = (rows * _extent(j, width, LEVEL)).to(rows_sum.dtype)
        mean = tl.sum(tl.where(inside, rows_sum, 0.0), 1) / area
        value += weight * mean * mean
        added += tl.where(inside, (2.0 * coefficient * weight * mean / area)[:, None], 0.0)
    return value, added


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
    DISTANCE: tl.constexpr, TOP: tl.constexpr, RESIZED: tl.constexpr, BILINEAR: tl.constexpr,
    ACC: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """unit: 1 / (planes of the whole map * total weight of the levels), pixel_unit: that over height * width."""
    GRADIENT: tl.constexpr = coefficients is not None
    kept = True
    if keep is not None:
        kept = tl.load(keep).to(tl.int1)
        if not GRADIENT:
            if not kept:
                return
    plane = tl.program_id(0).to(tl.int64) * PLANES + tl.arange(0, PLANES)
    exists = plane < planes
    sample, channel = plane // channels, plane % channels
    student_at = (sample * student_n + channel * student_c)[:, None, None]
    teacher_at = (sample * teacher_n + channel * teacher_c)[:, None, None]
    x = tl.arange(0, COLS)
    scaled = (tl.zeros([PLANES], tl.float64) + unit).to(ACC)
    pixel = (tl.zeros([PLANES], tl.float64) + pixel_unit).to(ACC)
    coefficient = tl.zeros([PLANES], ACC)
    if GRADIENT:
        coefficient = tl.where(kept, tl.load(coefficients).to(ACC), 0.0) + coefficient

    value = tl.zeros([PLANES], ACC)
    sums_40, sums_41 = tl.zeros([PLANES, COLS], ACC), tl.zeros([PLANES, COLS], ACC)
    sums_42, sums_43 = tl.zeros([PLANES, COLS], ACC), tl.zeros([PLANES, COLS], ACC)
    sums_20, sums_21 = tl.zeros([PLANES, COLS], ACC), tl.zeros([PLANES, COLS], ACC)
    sums_10 = tl.zeros([PLANES, COLS], ACC)
    if partials is not None or TOP > 0:
        for begin in range(0, height, ROWS):
            y = begin + tl.arange(0, ROWS)
            mask = exists[:, None, None] & (y < height)[None, :, None] & (x < width)[None, None, :] & kept
            a = _student(
                student, student_at, y[None, :, None], x[None, None, :], mask,
                student_y, student_x, in_height, in_width, height, width, scale_y, scale_x, RESIZED, BILINEAR, ACC,
            )  # fmt: skip
            b = tl.load(
                teacher + teacher_at + y[None, :, None] * teacher_y + x[None, None, :] * teacher_x, mask=mask, other=0.0
            ).to(ACC)
            d = tl.where(mask, a - b, 0.0)
            term = tl.abs(d) if DISTANCE == L1_CODE else d * d
            value += pixel * tl.sum(tl.sum(term, 2), 1)
            if TOP > 0:
                row = y[None, :, None]
                sums_10 += tl.sum(d, 1)
                if TOP > 1:
                    sums_20 += tl.sum(tl.where(_in_window(row, 0, height, 2), d, 0.0), 1)
                    sums_21 += tl.sum(tl.where(_in_window(row, 1, height, 2), d, 0.0), 1)
                if TOP > 2:
                    sums_40 += tl.sum(tl.where(_in_window(row, 0, height, 4), d, 0.0), 1)
                    sums_41 += tl.sum(tl.where(_in_window(row, 1, height, 4), d, 0.0), 1)
                    sums_42 += tl.sum(tl.where(_in_window(row, 2, height, 4), d, 0.0), 1)
                    sums_43 += tl.sum(tl.where(_in_window(row, 3, height, 4), d, 0.0), 1)
    if TOP > 0:
        v, added_10 = _columns(sums_10, _extent(0, height, 1), 0, x, width, scaled, coefficient, TOP, 1)
        value += v
        if TOP > 1:
            v, added_20 = _columns(sums_20, _extent(0, height, 2), 0, x, width, scaled, coefficient, TOP, 2)
            value += v
            v, added_21 = _columns(sums_21, _extent(1, height, 2), 1, x, width, scaled, coefficient, TOP, 2)
            value += v
        if TOP > 2:
            v, added_40 = _columns(sums_40, _extent(0, height, 4), 0, x, width, scaled, coefficient, TOP, 4)
            value += v
            v, added_41 = _columns(sums_41, _extent(1, height, 4), 1, x, width, scaled, coefficient, TOP, 4)
            value += v
            v, added_42 = _columns(sums_42, _extent(2, height, 4), 2, x, width, scaled, coefficient, TOP, 4)
            value += v
            v, added_43 = _columns(sums_43, _extent(3, height, 4), 3, x, width, scaled, coefficient, TOP, 4)
            value += v
    if partials is not None:
        tl.store(partials + tl.program_id(0), tl.sum(value, 0))

    if GRADIENT:
        factor = (coefficient * pixel)[:, None, None]
        for begin in range(0, height, ROWS):
            y = begin + tl.arange(0, ROWS)
            inside = exists[:, None, None] & (y < height)[None, :, None] & (x < width)[None, None, :]
            mask = inside & kept
            a = _student(
                student, student_at, y[None, :, None], x[None, None, :], mask,
                student_y, student_x, in_height, in_width, height, width, scale_y, scale_x, RESIZED, BILINEAR, ACC,
            )  # fmt: skip
            b = tl.load(
                teacher + teacher_at + y[None, :, None] * teacher_y + x[None, None, :] * teacher_x, mask=mask, other=0.0
            ).to(ACC)
            d = a - b
            if DISTANCE == L1_CODE:
                g = factor * tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, 0.0))
            else:
                g = factor * 2.0 * d
            if TOP > 0:
                row = y[None, :, None]
                g += added_10[:, None, :]
                if TOP > 1:
                    g += tl.where(_in_window(row, 0, height, 2), added_20[:, None, :], 0.0)
                    g += tl.where(_in_window(row, 1, height, 2), added_21[:, None, :], 0.0)
                if TOP > 2:
                    g += tl.where(_in_window(row, 0, height, 4), added_40[:, None, :], 0.0)
                    g += tl.where(_in_window(row, 1, height, 4), added_41[:, None, :], 0.0)
                    g += tl.where(_in_window(row, 2, height, 4), added_42[:, None, :], 0.0)
                    g += tl.where(_in_window(row, 3, height, 4), added_43[:, None, :], 0.0)
            g = tl.where(mask, g, 0.0)
            row, column = y[None, :, None], x[None, None, :]
            if student_grad is not None:
                to = student_grad + student_at + row * student_y + column * student_x
                tl.store(to, g.to(student_grad.dtype.element_ty), mask=inside)
            if resized_grad is not None:
                to = resized_grad + (plane[:, None, None] * height + row) * width + column
                tl.store(to, g, mask=inside)
            if teacher_grad is not None:
                to = teacher_grad + teacher_at + row * teacher_y + column * teacher_x
                tl.store(to, (-g).to(teacher_grad.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------- attention
@triton.jit(do_not_specialize=[*SIZES])
def squares_kernel(
    maps,  # [samples, channels, in_height, in_width]
    energy,  # [samples, height * width]
    keep,  # [1], or None
    channels, height, width, in_height, in_width, stride_n, stride_c, stride_y, stride_x, scale_y, scale_x,
    RESIZED: tl.constexpr, BILINEAR: tl.constexpr, ACC: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    if keep is not None:
        if not tl.load(keep).to(tl.int1):
            return
    sample = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < height * width
    y, x = (at // width)[None, :], (at % width)[None, :]
    sum = tl.zeros([TILE], ACC)
    for begin in range(0, channels, CHANNELS):
        channel = (begin + tl.arange(0, CHANNELS))[:, None]
        value = _student(
            maps, sample * stride_n + channel * stride_c, y, x, (channel < channels) & inside[None, :],
            stride_y, stride_x, in_height, in_width, height, width, scale_y, scale_x, RESIZED, BILINEAR, ACC,
        )  # fmt: skip
        sum += tl.sum(value * value, 0)
    tl.store(energy + sample * (height * width) + at, sum, mask=inside)


@triton.jit(do_not_specialize=[*SIZES])
def scale_kernel(
    maps,  # [samples, channels, in_height, in_width]
    factor,  # [samples, height * width]
    out,  # like maps, or where they are resized [samples, channels, height, width] in the type of the arithmetic
    keep,  # [1], or None
    channels, height, width, in_height, in_width, stride_n, stride_c, stride_y, stride_x,
    out_n, out_c, out_y, out_x, scale_y, scale_x,
    RESIZED: tl.constexpr, BILINEAR: tl.constexpr, ACC: tl.constexpr, CHANNELS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """out = resized maps * factor of their position."""
    kept = True
    if keep is not None:
        kept = tl.load(keep).to(tl.int1)
    sample = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < height * width
    by = tl.load(factor + sample * (height * width) + at, mask=inside & kept, other=0.0)[None, :]
    y, x = (at // width)[None, :], (at % width)[None, :]
    for begin in range(0, channels, CHANNELS):
        channel = (begin + tl.arange(0, CHANNELS))[:, None]
        mask = (channel < channels) & inside[None, :]
        value = _student(
            maps, sample * stride_n + channel * stride_c, y, x, mask & kept,
            stride_y, stride_x, in_height, in_width, height, width, scale_y, scale_x, RESIZED, BILINEAR, ACC,
        )  # fmt: skip
        to = sample * out_n + channel * out_c + y * out_y + x * out_x
        tl.store(out + to, (value * by).to(out.dtype.element_ty), mask=mask)


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
    each, plan = (_attention, None) if distance == ATTENTION else (_pixels, [_tile(x, accumulate) for x in teachers])
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
    pixels_kernel[(programs,)](
        student, teacher, None if resized else by_student, by_teacher, scratch, parts, keep, coefficient,
        samples * channels, *teacher.shape[1:], *student.shape[2:], *student.stride(), *teacher.stride(),
        *_scales(student, teacher), unit, unit / (height * width),
        DISTANCE=distance, TOP=levels[0][0] if levels else 0, RESIZED=resized, BILINEAR=bilinear, ACC=_type(accumulate),
        PLANES=planes, ROWS=rows, COLS=columns, num_warps=max(1, min(8, planes * rows * columns // 512)),
    )  # fmt: skip
    if scratch is not None:
        _gather(scratch, student, teacher, by_student, bilinear, accumulate)


def _attention(student, teacher, keep, _, bilinear, accumulate, coefficient, parts, by_student, by_teacher, __):
    positions = teacher.shape[2] * teacher.shape[3]
    grid = triton.cdiv(positions, 64), teacher.shape[0]
    tile = {"BILINEAR": bilinear, "ACC": _type(accumulate), "CHANNELS": 16, "TILE": 64, "num_warps": 4}
    maps = []
    for x in (student, teacher):
        energy = x.new_zeros(x.shape[0], positions, dtype=accumulate)
        squares_kernel[grid](
            x, energy, keep, x.shape[1], *teacher.shape[2:], *x.shape[2:], *x.stride(), *_scales(x, teacher),
            RESIZED=x.shape[2:] != teacher.shape[2:], **tile,
        )  # fmt: skip
        norm = torch.linalg.vector_norm(energy, dim=1, keepdim=True)
        inverse = torch.where(norm == 0, 0.0, 1 / norm)
        maps.append((energy * inverse, inverse))
    difference = maps[0][0] - maps[1][0]  # zero where the pathway is dropped
    for x, out, (unit, inverse), sign in zip((student, teacher), (by_student, by_teacher), maps, (1, -1), strict=True):
        if out is None:
            continue
        along = (unit * difference).sum(1, keepdim=True)
        factor = coefficient.to(accumulate) * (4 * sign / difference.numel()) * inverse * (difference - unit * along)
        resized = x.shape[2:] != teacher.shape[2:]
        to = x.new_empty(*x.shape[:2], *teacher.shape[2:], dtype=accumulate) if resized else out
        scale_kernel[grid](
            x, factor, to, keep, x.shape[1], *teacher.shape[2:], *x.shape[2:], *x.stride(), *to.stride(),
            *_scales(x, teacher), RESIZED=resized, **tile,
        )  # fmt: skip
        if resized:
            _gather(to, x, teacher, out, bilinear, accumulate)
    if parts is not None:
        parts[0] = difference.square().mean()


def _gather(scratch, student, teacher, by_student, bilinear, accumulate) -> None:
    # Outputs that may read an input pixel: those of two input pixels' breadth, and two more on either side.
    reach = [2 * triton.cdiv(o, i) + 4 for i, o in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    gather_kernel[(triton.cdiv(student.numel(), 512),)](
        scratch, by_student, student.numel(), *student.shape[1:], *teacher.shape[2:], *by_student.stride(),
        *_scales(student, teacher), REACH_Y=reach[0], REACH_X=reach[1],
        BILINEAR=bilinear, ACC=_type(accumulate), TILE=512, num_warps=4,
    )  # fmt: skip


def _scales(student: Tensor, teacher: Tensor) -> list[float]:
    """Of height and width, in fp32 as PyTorch divides them."""
    return [
        (torch.tensor(float(i)) / torch.tensor(float(o))).item()
        for i, o in zip(student.shape[2:], teacher.shape[2:], strict=True)
    ]


def _type(accumulate: torch.dtype):
    return tl.float64 if accumulate == torch.float64 else tl.float32

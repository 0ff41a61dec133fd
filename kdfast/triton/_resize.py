"""Resized feature maps in Triton: torch.nn.functional.interpolate as a load, and its adjoint as a gather.

    resized[Y, X] = sum over (y, x) of share(Y, y) share(X, x) map[y, x]

A map is resized where it is read, at no memory of its own. The adjoint wants, for each pixel of the map, the outputs
that read it; a Triton program cannot pick elements of a tile, so their gradient goes through memory in the type of the
arithmetic, and each pixel sums its few readers from there: no atomics, the same result every time.
Memory for n outputs and m pixels: 4 n (fp64: 8 n) written, read mostly from cache, and m elements written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZES = ("channels", "height", "width", "in_height", "in_width")  # few programs serve all; strides do specialise


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
def load_resized(
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


def gather(scratch, student, teacher, by_student, bilinear, accumulate) -> None:
    # Outputs that may read an input pixel: those of two input pixels' breadth, and two more on either side.
    reach = [2 * triton.cdiv(o, i) + 4 for i, o in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    gather_kernel[(triton.cdiv(student.numel(), 512),)](
        scratch, by_student, student.numel(), *student.shape[1:], *teacher.shape[2:], *by_student.stride(),
        *scales(student, teacher), REACH_Y=reach[0], REACH_X=reach[1],
        BILINEAR=bilinear, ACC=arithmetic(accumulate), TILE=512, num_warps=4,
    )  # fmt: skip


def scales(student: Tensor, teacher: Tensor) -> list[float]:
    """Of height and width, in fp32 as PyTorch divides them."""
    return [
        (torch.tensor(float(i)) / torch.tensor(float(o))).item()
        for i, o in zip(student.shape[2:], teacher.shape[2:], strict=True)
    ]


def arithmetic(accumulate: torch.dtype):
    return tl.float64 if accumulate == torch.float64 else tl.float32

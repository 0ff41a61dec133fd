"""incorrect_brier in Triton: row statistics forward, elementwise backward.
The definition: kdfast/reference/incorrect_brier.py.

    p = softmax(z),  a = p - y,   loss = sum a^2  where argmax z != argmax y, else 0
    dz = 2 p (a - <p, a>)         where wrong, else 0

Fused: softmax, prediction, squared error and gradient. Forward sweeps a row twice in tiles of columns, the second
time from cache: the largest logit, the first place of it and the sum of exponentials; then sum a^2 and <p, a>, whose
differences must be taken before they are squared. Backward is elementwise in the four statistics and reads wrong rows
only. Memory for a row of C classes of b bytes: forward reads C b, backward reads C b where wrong and writes C b.
16-bit types are storage only, cast right after their load.
Source: Liu et al. 2022 (arXiv:2202.07940), eq. 8.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.reference.incorrect_brier import STATS
from kdfast.reference.kd_kl import accumulate_dtype

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))


@triton.jit
def _tile(pointer, base, column, mask, other, ACC: tl.constexpr):
    return tl.load(pointer + base[:, None] + column[None, :], mask=mask, other=other).to(ACC)


@triton.jit
def _exponential(z, max):
    """exp(z - max): NaN for a NaN in either and for inf - inf."""
    return tl.exp2((z - max[:, None]) * LOG2E)


@triton.jit
def _see(largest, place, x, column, mask):
    """(the largest value so far, where it was seen first); a NaN is passed over."""
    x = tl.where(mask & (x == x), x, -INF)
    tile_max = tl.max(x, 1)
    tile_place = tl.min(tl.where(mask & (x == tile_max[:, None]), column[None, :], 0x7FFFFFFF), 1)
    return tl.maximum(largest, tile_max), tl.where(tile_max > largest, tile_place, place)


@triton.jit
def _labels(labels, labels_stride, row, exists, classes, ignored):
    """(does the row count, its label, is that out of range)."""
    label = tl.load(labels + row * labels_stride, mask=exists, other=0)
    counts = exists & (label != ignored)
    return counts, label, counts & ((label < 0) | (label >= classes))


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def forward_kernel(
    logits,  # [rows, classes]
    labels,  # [rows], or None
    target,  # [rows, classes], or None
    loss,  # [rows]
    stats,  # [rows, 4]
    rows, classes, labels_stride, ignore_index,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    base = row * classes
    nothing = tl.zeros([ROWS], ACC)
    counts, label, outside = exists, tl.zeros([ROWS], tl.int64), exists & False
    if labels is not None:
        counts, label, outside = _labels(labels, labels_stride, row, exists, classes, ignore_index)

    largest, total, target_max, mass = nothing - INF, nothing, nothing - INF, nothing
    place, target_place = tl.zeros([ROWS], tl.int32), tl.zeros([ROWS], tl.int32)
    for begin in range(0, classes, COLS):
        column = begin + tl.arange(0, COLS)
        mask = counts[:, None] & (column < classes)[None, :]
        z = _tile(logits, base, column, mask, -INF, ACC)  # outside the row: masked classes, adding nothing
        before = largest
        largest, place = _see(largest, place, z, column, mask)
        reach = tl.where(largest == -INF, 0.0, largest)  # what exponentials are measured from
        factor = tl.where(largest > before, tl.exp2((before - reach) * LOG2E), 1.0)
        total = total * factor + tl.sum(_exponential(z, reach), 1)
        if target is not None:
            y = _tile(target, base, column, mask, 0.0, ACC)
            mass += tl.sum(y, 1)
            target_max, target_place = _see(target_max, target_place, y, column, mask)

    if target is not None:
        label = target_place.to(tl.int64)
    # A NaN among the logits or a +inf makes the sum NaN; no finite logit leaves it 0.
    # One use of `mass`: of a sum over tiles that is used twice, a pass of Triton 3.7's compiler asserts that it is not.
    spoilt = outside | (total != total) | (total == 0.0) | ((mass < INF) == 0)
    is_wrong = counts & (label != place) & (spoilt == 0)
    inverse = 1.0 / tl.where(is_wrong, total, 1.0)
    reach = tl.where(is_wrong, largest, 0.0)
    squares, inner = nothing, nothing
    for begin in range(0, classes, COLS):
        column = begin + tl.arange(0, COLS)
        mask = is_wrong[:, None] & (column < classes)[None, :]
        p = _exponential(_tile(logits, base, column, mask, -INF, ACC), reach) * inverse[:, None]
        if target is not None:
            y = _tile(target, base, column, mask, 0.0, ACC)
        else:
            y = (mask & (column[None, :] == label[:, None])).to(ACC)
        squares += tl.sum((p - y) * (p - y), 1)
        inner += tl.sum(p * (p - y), 1)

    wrong = tl.where(counts & spoilt, float("nan"), is_wrong.to(ACC))
    tl.store(loss + row, tl.where(is_wrong, squares, wrong), mask=exists)
    tl.store(stats + row * 4 + 0, tl.where(counts, largest, 0.0), mask=exists)
    tl.store(stats + row * 4 + 1, total, mask=exists)
    tl.store(stats + row * 4 + 2, inner, mask=exists)
    tl.store(stats + row * 4 + 3, wrong, mask=exists)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    grad,  # [rows]
    logits,  # [rows, classes]
    labels,  # [rows], or None
    target,  # [rows, classes], or None
    stats,  # [rows, 4]
    gradient,  # [rows, classes]
    rows, classes, grad_stride, labels_stride,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    base = row * classes
    wrong = tl.load(stats + row * 4 + 3, mask=exists, other=0.0)
    reads = wrong == 1.0
    largest = tl.load(stats + row * 4 + 0, mask=reads, other=0.0)
    inverse = 1.0 / tl.load(stats + row * 4 + 1, mask=reads, other=1.0)
    inner = tl.load(stats + row * 4 + 2, mask=reads, other=0.0)
    factor = 2.0 * tl.load(grad + row * grad_stride, mask=reads, other=0.0).to(ACC)
    for begin in range(tl.program_id(1) * COLS, classes, tl.num_programs(1) * COLS):
        column = begin + tl.arange(0, COLS)
        inside = exists[:, None] & (column < classes)[None, :]
        mask = inside & reads[:, None]
        p = _exponential(_tile(logits, base, column, mask, -INF, ACC), largest) * inverse[:, None]
        if target is not None:
            y = _tile(target, base, column, mask, 0.0, ACC)
        else:
            label = tl.load(labels + row * labels_stride, mask=reads, other=0)
            y = (column[None, :] == label[:, None]).to(ACC)
        d = tl.where(mask, factor[:, None] * p * ((p - y) - inner[:, None]), wrong[:, None])  # else 0 or NaN
        tl.store(gradient + base[:, None] + column[None, :], d.to(gradient.dtype.element_ty), mask=inside)


def tile(classes: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program: several whole rows of few classes, one row of more, of many 4096
    columns (fp64: 1024) at a time. A thread holds 8 columns, in fp64 4: more spills."""
    widest, of_warp = (1024, 128) if dtype == torch.float64 else (4096, 256)
    columns = min(max(16, triton.next_power_of_2(classes)), widest)
    return max(1, 128 // columns), columns, max(2, columns // of_warp)


def incorrect_brier(
    logits: Tensor,  # [rows, classes]
    labels: Tensor | None,  # [rows]
    target: Tensor | None,  # [rows, classes]
    ignore_index: int,
) -> tuple[Tensor, Tensor]:  # [rows], [rows, STATS]
    """The kernel of the op of this name; its schema stands in kdfast/ops/incorrect_brier.py."""
    rows, classes = logits.shape
    loss = logits.new_empty(rows, dtype=accumulate_dtype(logits.dtype))
    stats = loss.new_empty(rows, STATS)
    if rows > 0:
        tile_rows, tile_columns, warps = tile(classes, logits.dtype)
        with _device(logits):
            forward_kernel[(triton.cdiv(rows, tile_rows),)](
                logits, labels, target, loss, stats, rows, classes, _stride(labels), ignore_index,
                ACC=_accumulate(loss.dtype), ROWS=tile_rows, COLS=tile_columns, num_warps=warps,
            )  # fmt: skip
    return loss, stats


def incorrect_brier_backward(
    grad: Tensor,  # [rows]
    logits: Tensor,  # [rows, classes]
    labels: Tensor | None,  # [rows]
    target: Tensor | None,  # [rows, classes]
    stats: Tensor,  # [rows, STATS]
    ignore_index: int,
) -> Tensor:  # [rows, classes]
    """The kernel of the op of this name; its schema stands in kdfast/ops/incorrect_brier.py."""
    rows, classes = logits.shape
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if rows > 0:
        tile_rows, tile_columns, warps = tile(classes, logits.dtype)
        enough = max(1, 1024 // rows)  # programs that fill a GPU where rows are few
        parts = min(enough, triton.cdiv(classes, tile_columns))
        with _device(logits):
            backward_kernel[(triton.cdiv(rows, tile_rows), parts)](
                grad, logits, labels, target, stats, gradient, rows, classes, _stride(grad), _stride(labels),
                ACC=_accumulate(stats.dtype), ROWS=tile_rows, COLS=tile_columns, num_warps=warps,
            )  # fmt: skip
    return gradient


def _accumulate(dtype: torch.dtype):
    return tl.float64 if dtype == torch.float64 else tl.float32


def _stride(x: Tensor | None) -> int:
    return 0 if x is None or x.numel() == 1 else x.stride(0)


def _device(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

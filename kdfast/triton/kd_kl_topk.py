"""kd_kl_topk in Triton: KL to a teacher known by k classes and a tail. The definition: kdfast/reference/kd_kl_topk.py.

    loss = weight * tau^2 * [ sum_listed p (log p - log q) + p_tail (log p_tail - log q_tail) ]

A program has a row. It takes the k listed classes by their indices and streams the row once in tiles of columns; a
histogram of the indices over the tile says which columns are listed, so that the tail is summed directly. Backward is
elementwise. Memory for a row of C classes of b bytes: forward reads C b, backward reads and writes C b; and 12 k bytes
a row each. 16-bit types are storage only, cast right after their load.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.reference.kd_kl import accumulate_dtype
from kdfast.reference.kd_kl_topk import STATS
from kdfast.triton.kd_kl import _device, _stride
from kdfast.triton.kd_kl_rows import INF, LN2, LOG2E


@triton.jit
def _number(pointer, stride, row, constant, ACC: tl.constexpr):
    """A value of the row from a tensor [rows] (or [1], stride 0), or a constant; through fp64, as Triton would pass a
    Python float on as fp32."""
    if pointer is not None:
        return tl.load(pointer + row * stride).to(ACC)
    return (tl.zeros([1], tl.float64) + constant).to(ACC).sum(0)


@triton.jit
def _listed(indices, log_probs, student, row, classes, k, counts, ACC: tl.constexpr, K: tl.constexpr):
    """(indices, is there a class, log p, student's logit) of the k classes, each [K]; and whether an index is none."""
    column = tl.arange(0, K)
    given = counts & (column < k)
    index = tl.load(indices + row * k + column, mask=given, other=-1)
    inside = given & (index >= 0) & (index < classes)
    log_p = tl.load(log_probs + row * k + column, mask=given, other=-INF).to(ACC)
    x = tl.load(student + row * classes + index, mask=inside, other=-INF).to(ACC)
    outside = tl.max((given & ((index < 0) | (index >= classes))).to(tl.int32), 0) > 0
    return index, inside, log_p, x, outside


@triton.jit
def _is_listed(index, inside, begin, COLS: tl.constexpr):
    """Which columns of a tile are listed."""
    here = inside & (index >= begin) & (index < begin + COLS)
    return tl.histogram(tl.where(here, index - begin, 0).to(tl.int32), COLS, mask=here) > 0


@triton.jit(do_not_specialize=["ignore_index"])
def forward_kernel(
    student,  # [rows, classes]
    log_probs, indices,  # [rows, k]
    temperature,  # [1] or [rows], or None
    labels,  # [rows], or None
    weight,  # [rows], or None
    loss,  # [rows]
    stats,  # [rows, 5]
    classes, k, temperature_stride, labels_stride, weight_stride, tau: tl.float64, ignore_index,
    TEMPERATURE_GRAD: tl.constexpr, EPS: tl.constexpr, NEAR: tl.constexpr,
    ACC: tl.constexpr, K: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    counts = row >= 0
    if labels is not None:
        counts = tl.load(labels + row * labels_stride) != ignore_index
    t = _number(temperature, temperature_stride, row, tau, ACC)
    w = _number(weight, weight_stride, row, 1.0, ACC)
    unit = 1.0 / t * LOG2E
    index, inside, log_p, x, outside = _listed(indices, log_probs, student, row, classes, k, counts, ACC, K)
    head_max = tl.max(x, 0)
    head_base = tl.where(head_max == -INF, 0.0, head_max)
    head_sum = tl.sum(tl.exp2((x - head_base) * unit), 0)

    nothing = head_sum * 0.0
    tail_max, tail_sum, tail_dot = nothing - INF, nothing, nothing
    for begin in range(0, classes, COLS):
        column = begin + tl.arange(0, COLS)
        y = tl.load(student + row * classes + column, mask=counts & (column < classes), other=-INF).to(ACC)
        y = tl.where(_is_listed(index, inside, begin, COLS), -INF, y)
        new = tl.maximum(tail_max, tl.max(y, 0))
        base = tl.where(new == -INF, 0.0, new)
        moved = tl.where(tail_max == -INF, 0.0, (base - tail_max) * unit)
        factor = tl.exp2(-moved)
        tail_dot, tail_sum = factor * (tail_dot - tail_sum * moved), factor * tail_sum
        distance = (y - base) * unit
        e = tl.exp2(distance)
        tail_sum += tl.sum(e, 0)
        tail_dot += tl.sum(tl.where(e == 0.0, 0.0, e * distance), 0)
        tail_max = new

    p = tl.exp2(log_p * LOG2E)
    p_tail = nothing
    if k < classes:  # 1 - p of the likeliest, exactly; then less the rest
        likeliest = tl.max(log_p, 0)
        rest = tl.where(tl.arange(0, K) == tl.argmax(log_p, 0), 0.0, p)
        entropy = -tl.sum(tl.where(p == 0.0, 0.0, p * log_p), 0)
        # 1 - e^x by its series near 0, where e^x would be rounded; x^6/5040 is below the rounding from -NEAR on
        series = likeliest * (1.0 / 24 + likeliest * (1.0 / 120 + likeliest * (1.0 / 720)))
        series = -likeliest * (1.0 + likeliest * (1.0 / 2 + likeliest * (1.0 / 6 + series)))
        first = tl.where(likeliest > -NEAR, series, 1.0 - tl.exp2(likeliest * LOG2E))
        left = first - tl.sum(rest, 0)
        p_tail = tl.where(left > EPS * entropy, left, 0.0)

    top = tl.maximum(head_max, tail_max)
    to_tail = (tail_max - top) / t * LOG2E
    log2_z = tl.log2(head_sum * tl.exp2((head_max - top) * unit) + tail_sum * tl.exp2(to_tail))
    log2_q = (x - top) * unit - log2_z
    terms = tl.where(p == 0.0, 0.0, p * (log_p - log2_q * LN2))
    log_q_tail = (to_tail + tl.log2(tail_sum) - log2_z) * LN2
    tail_term = tl.where(p_tail == 0.0, 0.0, p_tail * (tl.log2(p_tail) * LN2 - log_q_tail))
    divergence = tl.sum(terms, 0) + tail_term
    g = tl.exp2(to_tail - log2_z) - tl.where(p_tail == 0.0, 0.0, p_tail / tail_sum)
    poison = tl.where(outside, float("nan"), 0.0)
    tl.store(loss + row, tl.where(counts, w * t * t * divergence + poison, 0.0))
    tl.store(stats + row * 5 + 0, tl.where(counts, top + poison, 0.0))
    tl.store(stats + row * 5 + 1, tl.where(counts, log2_z * LN2 + poison, 0.0))
    tl.store(stats + row * 5 + 2, tl.where(counts, tail_max, 0.0))
    tl.store(stats + row * 5 + 3, tl.where(counts, g + poison, 0.0))
    by_tau = nothing
    if TEMPERATURE_GRAD:
        u = (x - top) * unit
        inner = tl.sum(tl.where(u == -INF, 0.0, (tl.exp2(log2_q) - p) * u), 0)
        inner += tl.where(tail_sum > 0.0, g * (tail_dot + tail_sum * to_tail), 0.0)
        by_tau = tl.where(counts, w * t * (2.0 * divergence - inner * LN2) + poison, 0.0)
    tl.store(stats + row * 5 + 4, by_tau)


@triton.jit(do_not_specialize=["ignore_index"])
def backward_kernel(
    grad,  # [rows]
    student,  # [rows, classes]
    log_probs, indices,  # [rows, k]
    temperature,  # [1] or [rows], or None
    labels,  # [rows], or None
    weight,  # [rows], or None
    stats,  # [rows, 5]
    ds,  # [rows, classes]
    classes, k, grad_stride, temperature_stride, labels_stride, weight_stride, tau: tl.float64, ignore_index,
    ACC: tl.constexpr, K: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    counts = row >= 0
    if labels is not None:
        counts = tl.load(labels + row * labels_stride) != ignore_index
    t = _number(temperature, temperature_stride, row, tau, ACC)
    factor = _number(weight, weight_stride, row, 1.0, ACC) * tl.load(grad + row * grad_stride).to(ACC) * t
    unit = 1.0 / t * LOG2E
    index, inside, log_p, x, _outside = _listed(indices, log_probs, student, row, classes, k, counts, ACC, K)
    top = tl.load(stats + row * 5 + 0)
    log2_z = tl.load(stats + row * 5 + 1) * LOG2E
    tail_max = tl.load(stats + row * 5 + 2)
    g = factor * tl.load(stats + row * 5 + 3)
    base = tl.where(tail_max == -INF, 0.0, tail_max)
    for begin in range(0, classes, COLS):  # the tail, around the listed classes
        column = begin + tl.arange(0, COLS)
        y = tl.load(student + row * classes + column, mask=counts & (column < classes), other=-INF).to(ACC)
        out = tl.where(counts, g * tl.exp2((y - base) * unit), 0.0)
        mask = (column < classes) & (_is_listed(index, inside, begin, COLS) == 0)
        tl.store(ds + row * classes + column, out.to(ds.dtype.element_ty), mask=mask)
    out = factor * (tl.exp2((x - top) * unit - log2_z) - tl.exp2(log_p * LOG2E))
    tl.store(ds + row * classes + index, out.to(ds.dtype.element_ty), mask=inside)


MOST = 2048  # classes a program takes by their indices; above, the definition is called


def tile(classes: int, k: int) -> dict:
    columns = min(max(32, triton.next_power_of_2(classes)), 2048)
    return {"K": max(32, triton.next_power_of_2(k)), "COLS": columns, "num_warps": max(2, columns // 512)}


def kd_kl_topk(
    student: Tensor,  # [rows, classes]
    log_probs: Tensor,  # [rows, k]
    indices: Tensor,  # [rows, k]
    student_temperature: Tensor | None,  # [1] or [rows]
    labels: Tensor | None,  # [rows]
    weight: Tensor | None,  # [rows]
    tau_s: float,
    ignore_index: int,
    temperature_grad: bool,
) -> tuple[Tensor, Tensor]:  # [rows], [rows, STATS]
    """The kernel of the op of this name; its schema stands in kdfast/ops/kd_kl_topk.py."""
    rows, classes = student.shape
    k = indices.shape[1]
    if k > MOST:
        from kdfast.ops.kd_kl_topk import _reference_forward

        return _reference_forward(
            student, log_probs, indices, student_temperature, labels, weight, tau_s, ignore_index, temperature_grad
        )
    loss = student.new_empty(rows, dtype=accumulate_dtype(student.dtype))
    stats = loss.new_empty(rows, STATS)
    if rows == 0:
        return loss, stats
    strides = [_stride(x) for x in (student_temperature, labels, weight)]
    with _device(student):
        forward_kernel[(rows,)](
            student, log_probs, indices, student_temperature, labels, weight, loss, stats, classes, k, *strides,
            tau_s, ignore_index, TEMPERATURE_GRAD=temperature_grad, EPS=torch.finfo(loss.dtype).eps,
            NEAR=0.01 if loss.dtype == torch.float64 else 0.1,
            ACC=tl.float64 if loss.dtype == torch.float64 else tl.float32, **tile(classes, k),
        )  # fmt: skip
    return loss, stats


def kd_kl_topk_backward(
    grad: Tensor,  # [rows]
    student: Tensor,  # [rows, classes]
    log_probs: Tensor,  # [rows, k]
    indices: Tensor,  # [rows, k]
    student_temperature: Tensor | None,  # [1] or [rows]
    labels: Tensor | None,  # [rows]
    weight: Tensor | None,  # [rows]
    stats: Tensor,  # [rows, STATS]
    tau_s: float,
    ignore_index: int,
) -> Tensor:  # [rows, classes]
    """The kernel of the op of this name; its schema stands in kdfast/ops/kd_kl_topk.py."""
    rows, classes = student.shape
    k = indices.shape[1]
    if k > MOST:
        from kdfast.ops.kd_kl_topk import _reference_backward

        return _reference_backward(
            grad, student, log_probs, indices, student_temperature, labels, weight, stats, tau_s, ignore_index
        )
    ds = student.new_empty(student.shape)
    if rows == 0:
        return ds
    strides = [_stride(x) for x in (grad, student_temperature, labels, weight)]
    with _device(student):
        backward_kernel[(rows,)](
            grad, student, log_probs, indices, student_temperature, labels, weight, stats, ds, classes, k, *strides,
            tau_s, ignore_index, ACC=tl.float64 if stats.dtype == torch.float64 else tl.float32, **tile(classes, k),
        )  # fmt: skip
    return ds

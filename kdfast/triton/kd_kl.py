"""kd_kl in Triton: row statistics forward, elementwise backward. The definition: kdfast/reference/kd_kl.py.

    loss = weight * [ alpha * CE + (1 - alpha) * c * D ],   D = sum p (k log p - log q)

The distribution that weighs is called `from` (p: the teacher; for reverse_kl the student), the other `to` (q)

    dD / d to logits = q - p      dD / d from logits = p (r - D),  r = k log p - log q

Fused: three softmaxes, the divergence, the hard labels' cross-entropy and all gradients. Forward sweeps the
row once in tiles of columns (twice where a temperature wants its gradient), with sums kept relative to the
largest logit so far; backward is elementwise given the statistics. Memory for a row of C classes of b bytes:
forward reads 2 C b, backward reads 2 C b and writes C b. Exponentials are to base 2, log2(e) / tau folded in;
16-bit types are storage only, cast right after their load.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.reference.kd_kl import STATS, Options, accumulate_dtype

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
REVERSE_KL, SOFT_CE = tl.constexpr(1), tl.constexpr(2)
SCALE_TAU2, SCALE_PRODUCT = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def _constant(value, row, ACC: tl.constexpr):
    """A number of the call, a value a row; through fp64, as Triton would pass a Python float on as fp32."""
    return (tl.zeros(row.shape, tl.float64) + value).to(ACC)


@triton.jit
def _column(pointer, stride, row, exists, constant, ACC: tl.constexpr):
    """A value a row from a tensor [rows] (or [1], stride 0), or a constant where there is no tensor."""
    if pointer is not None:
        return tl.load(pointer + row * stride, mask=exists, other=1.0).to(ACC)
    return _constant(constant, row, ACC)


@triton.jit
def _rows(labels, labels_stride, weight, weight_stride, row, exists, classes, ignored, ACC: tl.constexpr):
    """(does the row count, its coefficient, its label): NaN for a label out of range, 0 for none."""
    coefficient = _column(weight, weight_stride, row, exists, 1.0, ACC)
    counts = exists
    label = tl.zeros(row.shape, tl.int64)
    if labels is not None:
        label = tl.load(labels + row * labels_stride, mask=exists, other=0)
        counts = exists & (label != ignored)
        coefficient = tl.where((label >= 0) & (label < classes), coefficient, float("nan"))
    return counts, coefficient, label


@triton.jit
def _scale(tau_s, tau_t, SCALE: tl.constexpr):
    """c and its derivatives in tau_s and tau_t."""
    if SCALE == SCALE_TAU2:
        return tau_s * tau_s, 2.0 * tau_s, tau_s * 0.0
    if SCALE == SCALE_PRODUCT:
        return tau_s * tau_t, tau_t, tau_s
    return tau_s * 0.0 + 1.0, tau_s * 0.0, tau_s * 0.0


@triton.jit
def _raise(old, tile_max, k):
    """The maximum raised by a tile's: (new maximum, where to measure from, effect on sums, on distances)."""
    new = tl.maximum(old, tile_max)
    distance = tl.where(new > old, (new - old) * k, 0.0)
    factor = tl.exp2(-distance)
    distance = tl.where(old == -INF, 0.0, distance)
    return new, tl.where(new == -INF, 0.0, new), factor, distance


@triton.jit
def _tile(pointer, base, column, mask, other, ACC: tl.constexpr):
    return tl.load(pointer + base[:, None] + column[None, :], mask=mask, other=other).to(ACC)


@triton.jit
def _from_to(s, t, DIVERGENCE: tl.constexpr):
    """What belongs to (student, teacher), ordered as (from, to); the same call turns it back."""
    if DIVERGENCE == REVERSE_KL:
        return s, t
    return t, s


@triton.jit
def _ratio(log2_p, log2_q, DIVERGENCE: tl.constexpr):
    """r = k log p - log q, in units of log 2."""
    if DIVERGENCE == SOFT_CE:
        return -log2_q
    return log2_p - log2_q


@triton.jit
def _put(stats, i, value, row, counts, exists):
    """One statistic, [rows, 8]; 0 for a row that does not count, as for what the loss does not need."""
    tl.store(stats + row * 8 + i, tl.where(counts, value, 0.0), mask=exists)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def forward_kernel(
    student, teacher,  # [rows, classes]
    temperature_s, temperature_t,  # [1] or [rows], or None
    labels,  # [rows], or None
    target,  # [rows, classes], or None
    weight,  # [rows], or None
    loss,  # [rows]
    stats,  # [rows, 8]
    rows, classes, temperature_s_stride, temperature_t_stride, labels_stride, weight_stride,
    tau_s: tl.float64, tau_t: tl.float64, alpha: tl.float64, smoothing: tl.float64, ignore_index,
    DIVERGENCE: tl.constexpr, SCALE: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr, TEMPERATURE_GRAD: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    base = row * classes
    counts, coefficient, label = _rows(
        labels, labels_stride, weight, weight_stride, row, exists, classes, ignore_index, ACC
    )
    ts = _column(temperature_s, temperature_s_stride, row, exists, tau_s, ACC)
    tt = _column(temperature_t, temperature_t_stride, row, exists, tau_t, ACC)
    k_from, k_to = _from_to(1.0 / ts * LOG2E, 1.0 / tt * LOG2E, DIVERGENCE)

    nothing = tl.zeros([ROWS], ACC)
    from_max, from_sum, to_max, to_sum, cross = nothing - INF, nothing, nothing - INF, nothing, nothing
    one_max, one_sum, finite, finite_dot = nothing - INF, nothing, nothing, nothing
    mass, dot = nothing, nothing
    for begin in range(0, classes, COLS):
        column = begin + tl.arange(0, COLS)
        mask = counts[:, None] & (column < classes)[None, :]
        s = _tile(student, base, column, mask, -INF, ACC)  # outside the row: masked classes, adding nothing
        if SOFT:
            x, y = _from_to(s, _tile(teacher, base, column, mask, -INF, ACC), DIVERGENCE)
            weighs = from_sum
            from_max, from_base, from_factor, from_distance = _raise(from_max, tl.max(x, 1), k_from)
            to_max, to_base, to_factor, to_distance = _raise(to_max, tl.max(y, 1), k_to)
            moved = from_factor * (cross - weighs * _ratio(from_distance, to_distance, DIVERGENCE))
            y_from = (x - from_base[:, None]) * k_from[:, None]
            y_to = (y - to_base[:, None]) * k_to[:, None]
            e = tl.exp2(y_from)
            from_sum = from_sum * from_factor + tl.sum(e, 1)
            to_sum = to_sum * to_factor + tl.sum(tl.exp2(y_to), 1)
            terms = tl.where(e == 0.0, 0.0, e * _ratio(y_from, y_to, DIVERGENCE))  # 0 log 0 = 0
            cross = tl.where(from_factor == 0.0, 0.0, moved) + tl.sum(terms, 1)
        if HARD:
            one_max, one_base, one_factor, one_distance = _raise(one_max, tl.max(s, 1), LOG2E)
            y_one = (s - one_base[:, None]) * LOG2E
            one_sum = one_sum * one_factor + tl.sum(tl.exp2(y_one), 1)
            if SMOOTH:
                unmasked = s != -INF
                finite_dot += tl.sum(tl.where(unmasked, y_one, 0.0), 1) - finite * one_distance
                finite += tl.sum(unmasked.to(ACC), 1)
            if target is not None:
                w = _tile(target, base, column, mask, 0.0, ACC)
                dot += tl.sum(tl.where(w == 0.0, 0.0, w * y_one), 1) - mass * one_distance
                mass += tl.sum(w, 1)

    value, max_s, max_t, log2_z_u, log2_z_v, log2_z_one = nothing, one_max, nothing, nothing, nothing, nothing
    divergence, by_tau_s, by_tau_t = nothing, nothing, nothing
    if SOFT:
        keep = _constant(1.0 - alpha, row, ACC)
        c, c_s, c_t = _scale(ts, tt, SCALE)
        # One logarithm of a ratio rather than two logarithms: digits for distributions that nearly agree.
        if DIVERGENCE == SOFT_CE:
            divergence = (cross / from_sum + tl.log2(to_sum)) * LN2
        else:
            divergence = (cross / from_sum + tl.log2(to_sum / from_sum)) * LN2
        value = keep * c * divergence
        log2_z_from, log2_z_to = tl.log2(from_sum), tl.log2(to_sum)
        max_s, max_t = _from_to(from_max, to_max, DIVERGENCE)
        log2_z_u, log2_z_v = _from_to(log2_z_from, log2_z_to, DIVERGENCE)
        if TEMPERATURE_GRAD:
            # <dD/du, u>: the gradients sum to zero over the row, so log q may stand for u and log p for v.
            by_from, by_to = nothing, nothing
            for begin in range(0, classes, COLS):
                column = begin + tl.arange(0, COLS)
                mask = counts[:, None] & (column < classes)[None, :]
                s = _tile(student, base, column, mask, -INF, ACC)
                x, y = _from_to(s, _tile(teacher, base, column, mask, -INF, ACC), DIVERGENCE)
                log2_p = (x - from_max[:, None]) * k_from[:, None] - log2_z_from[:, None]
                log2_q = (y - to_max[:, None]) * k_to[:, None] - log2_z_to[:, None]
                p = tl.exp2(log2_p)
                r = _ratio(log2_p, log2_q, DIVERGENCE) * LN2 - divergence[:, None]
                by_from += tl.sum(tl.where(p == 0.0, 0.0, p * r * log2_p), 1)
                by_to += tl.sum(tl.where(log2_q == -INF, 0.0, (tl.exp2(log2_q) - p) * log2_q), 1)
            inner_s, inner_t = _from_to(by_from, by_to, DIVERGENCE)
            by_tau_s = coefficient * keep * (c_s * divergence - c * inner_s / ts * LN2)
            by_tau_t = coefficient * keep * (c_t * divergence - c * inner_t / tt * LN2)
    if HARD:
        log2_z_one = tl.log2(one_sum)
        if target is None:  # a label is a target of mass one
            at_label = counts & (label >= 0) & (label < classes)
            logit = tl.load(student + base + label, mask=at_label, other=0.0).to(ACC)
            mass, dot = nothing + 1.0, (logit - tl.where(one_max == -INF, 0.0, one_max)) * LOG2E
        keep_hard = _constant(1.0 - smoothing, row, ACC)
        hard = tl.where(keep_hard > 0.0, keep_hard * (mass * log2_z_one - dot), 0.0)
        if SMOOTH:
            hard += _constant(smoothing, row, ACC) * (log2_z_one - finite_dot / finite)
        value += _constant(alpha, row, ACC) * hard * LN2
    tl.store(loss + row, tl.where(counts, coefficient * value, 0.0), mask=exists)
    _put(stats, 0, max_s, row, counts, exists)
    _put(stats, 1, max_t, row, counts, exists)
    _put(stats, 2, log2_z_u * LN2, row, counts, exists)
    _put(stats, 3, log2_z_v * LN2, row, counts, exists)
    _put(stats, 4, log2_z_one * LN2, row, counts, exists)
    _put(stats, 5, divergence, row, counts, exists)
    _put(stats, 6, by_tau_s, row, counts, exists)
    _put(stats, 7, by_tau_t, row, counts, exists)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def backward_kernel(
    grad,  # [rows]
    student, teacher,  # [rows, classes]
    temperature_s, temperature_t,  # [1] or [rows], or None
    labels,  # [rows], or None
    target,  # [rows, classes], or None
    weight,  # [rows], or None
    stats,  # [rows, 8]
    student_grad, teacher_grad,  # [rows, classes], or None
    rows, classes, grad_stride, temperature_s_stride, temperature_t_stride, labels_stride, weight_stride,
    tau_s: tl.float64, tau_t: tl.float64, alpha: tl.float64, smoothing: tl.float64, ignore_index,
    DIVERGENCE: tl.constexpr, SCALE: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    base = row * classes
    counts, coefficient, label = _rows(
        labels, labels_stride, weight, weight_stride, row, exists, classes, ignore_index, ACC
    )
    ts = _column(temperature_s, temperature_s_stride, row, exists, tau_s, ACC)
    tt = _column(temperature_t, temperature_t_stride, row, exists, tau_t, ACC)
    factor = coefficient * tl.load(grad + row * grad_stride, mask=exists, other=0.0).to(ACC)
    max_s = tl.load(stats + row * 8 + 0, mask=counts, other=0.0)
    if SOFT:
        keep = _constant(1.0 - alpha, row, ACC)
        c, _c_s, _c_t = _scale(ts, tt, SCALE)
        k_from, k_to = _from_to(1.0 / ts * LOG2E, 1.0 / tt * LOG2E, DIVERGENCE)
        max_t = tl.load(stats + row * 8 + 1, mask=counts, other=0.0)
        from_max, to_max = _from_to(max_s, max_t, DIVERGENCE)
        log_z_u = tl.load(stats + row * 8 + 2, mask=counts, other=0.0)
        log_z_v = tl.load(stats + row * 8 + 3, mask=counts, other=0.0)
        log2_z_from, log2_z_to = _from_to(log_z_u * LOG2E, log_z_v * LOG2E, DIVERGENCE)
        divergence = tl.load(stats + row * 8 + 5, mask=counts, other=0.0)
        of_from, of_to = _from_to(keep * factor * c / ts, keep * factor * c / tt, DIVERGENCE)
    if HARD:
        log2_z = tl.load(stats + row * 8 + 4, mask=counts, other=0.0) * LOG2E
        of_hard = factor * _constant(alpha, row, ACC)
        keep_hard = _constant(1.0 - smoothing, row, ACC)
        mass = tl.zeros([ROWS], ACC) + 1.0  # of a label, with or without smoothing
        if SMOOTH or target is not None:  # the row's sums first; then one program has the whole row
            finite, target_sum = tl.zeros([ROWS], ACC), tl.zeros([ROWS], ACC)
            for begin in range(0, classes, COLS):
                column = begin + tl.arange(0, COLS)
                mask = counts[:, None] & (column < classes)[None, :]
                if SMOOTH:
                    s = _tile(student, base, column, mask, -INF, ACC)
                    finite += tl.sum((s != -INF).to(ACC), 1)
                if target is not None:
                    target_sum += tl.sum(_tile(target, base, column, mask, 0.0, ACC), 1)
            if target is not None:
                mass = keep_hard * target_sum + _constant(smoothing, row, ACC)
            if SMOOTH:
                spread = _constant(smoothing, row, ACC) / finite

    for begin in range(tl.program_id(1) * COLS, classes, tl.num_programs(1) * COLS):
        column = begin + tl.arange(0, COLS)
        inside = exists[:, None] & (column < classes)[None, :]
        mask = inside & counts[:, None]
        s = _tile(student, base, column, mask, -INF, ACC)
        ds = tl.zeros([ROWS, COLS], ACC)
        dt = tl.zeros([ROWS, COLS], ACC)
        if SOFT:
            x, y = _from_to(s, _tile(teacher, base, column, mask, -INF, ACC), DIVERGENCE)
            log2_p = (x - from_max[:, None]) * k_from[:, None] - log2_z_from[:, None]
            log2_q = (y - to_max[:, None]) * k_to[:, None] - log2_z_to[:, None]
            p = tl.exp2(log2_p)
            r = _ratio(log2_p, log2_q, DIVERGENCE) * LN2 - divergence[:, None]
            by_from = of_from[:, None] * tl.where(p == 0.0, 0.0, p * r)
            by_to = of_to[:, None] * (tl.exp2(log2_q) - p)
            ds, dt = _from_to(by_from, by_to, DIVERGENCE)
        if HARD:
            if target is not None:
                w = _tile(target, base, column, mask, 0.0, ACC)
            else:
                w = (column[None, :] == label[:, None]).to(ACC)
            probability = tl.exp2((s - max_s[:, None]) * LOG2E - log2_z[:, None])
            hard = mass[:, None] * probability - keep_hard[:, None] * w
            if SMOOTH:
                hard -= tl.where(s == -INF, 0.0, spread[:, None])
            ds += of_hard[:, None] * hard
        # An ignored row has gradient 0, whatever its logits hold.
        at = base[:, None] + column[None, :]
        if student_grad is not None:
            ds = tl.where(mask, ds, 0.0)
            tl.store(student_grad + at, ds.to(student_grad.dtype.element_ty), mask=inside)
        if teacher_grad is not None:
            dt = tl.where(mask, dt, 0.0)
            tl.store(teacher_grad + at, dt.to(teacher_grad.dtype.element_ty), mask=inside)


def tile(classes: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program: several whole rows of few classes, one row of more, of many 4096
    columns (fp64: 2048) at a time. A thread holds 8 columns or the scalars of 2 rows: more spills."""
    widest = 2048 if dtype == torch.float64 else 4096
    columns = min(max(16, triton.next_power_of_2(classes)), widest)
    return max(1, 128 // columns), columns, max(2, columns // 256)


def kd_kl(
    student: Tensor,  # [rows, classes]
    teacher: Tensor,  # [rows, classes]
    student_temperature: Tensor | None,  # [1] or [rows]
    teacher_temperature: Tensor | None,  # [1] or [rows]
    labels: Tensor | None,  # [rows]
    target: Tensor | None,  # [rows, classes]
    weight: Tensor | None,  # [rows]
    *options,
) -> tuple[Tensor, Tensor]:  # [rows], [rows, STATS]
    """The kernel of the op of this name; its schema stands in kdfast/ops/kd_kl.py."""
    *options, temperature_grad = options
    o = Options(*options)
    rows, classes = student.shape
    loss = student.new_empty(rows, dtype=accumulate_dtype(student.dtype))
    stats = loss.new_empty(rows, STATS)
    if rows == 0:
        return loss, stats
    strides = [_stride(x) for x in (student_temperature, teacher_temperature, labels, weight)]
    tile_rows, tile_columns, warps = tile(classes, student.dtype)
    with _device(student):
        forward_kernel[(triton.cdiv(rows, tile_rows),)](
            student, teacher, student_temperature, teacher_temperature, labels, target, weight, loss, stats,
            rows, classes, *strides, o.tau_s, o.tau_t, o.alpha, o.label_smoothing, o.ignore_index,
            **_constants(o, loss.dtype), TEMPERATURE_GRAD=temperature_grad,
            ROWS=tile_rows, COLS=tile_columns, num_warps=warps,
        )  # fmt: skip
    return loss, stats


def kd_kl_backward(
    grad: Tensor,  # [rows]
    student: Tensor,  # [rows, classes]
    teacher: Tensor,  # [rows, classes]
    student_temperature: Tensor | None,  # [1] or [rows]
    teacher_temperature: Tensor | None,  # [1] or [rows]
    labels: Tensor | None,  # [rows]
    target: Tensor | None,  # [rows, classes]
    weight: Tensor | None,  # [rows]
    stats: Tensor,  # [rows, STATS]
    *options,
) -> tuple[Tensor, Tensor]:  # [rows, classes] or [0], twice
    """The kernel of the op of this name; its schema stands in kdfast/ops/kd_kl.py."""
    *options, wants_student, wants_teacher = options
    o = Options(*options)
    rows, classes = student.shape
    ds = student.new_empty(student.shape if wants_student else 0)
    dt = teacher.new_empty(teacher.shape if wants_teacher else 0)
    if rows == 0:
        return ds, dt
    strides = [_stride(x) for x in (grad, student_temperature, teacher_temperature, labels, weight)]
    tile_rows, tile_columns, warps = tile(classes, student.dtype)
    constants = _constants(o, stats.dtype)
    sums_first = constants["HARD"] and (constants["SMOOTH"] or target is not None)
    enough = max(1, 1024 // rows)  # programs that fill a GPU where rows are few
    parts = 1 if sums_first else min(enough, triton.cdiv(classes, tile_columns))
    with _device(student):
        backward_kernel[(triton.cdiv(rows, tile_rows), parts)](
            grad, student, teacher, student_temperature, teacher_temperature, labels, target, weight, stats,
            ds if wants_student else None, dt if wants_teacher else None,
            rows, classes, *strides, o.tau_s, o.tau_t, o.alpha, o.label_smoothing, o.ignore_index,
            **constants, ROWS=tile_rows, COLS=tile_columns, num_warps=warps,
        )  # fmt: skip
    return ds, dt


def _constants(o: Options, accumulate: torch.dtype) -> dict:
    return {
        "DIVERGENCE": o.divergence,
        "SCALE": o.scale,
        "SOFT": o.alpha < 1,
        "HARD": o.alpha > 0,
        "SMOOTH": o.label_smoothing > 0,
        "ACC": tl.float64 if accumulate == torch.float64 else tl.float32,
    }


def _stride(x: Tensor | None) -> int:
    return 0 if x is None or x.numel() == 1 else x.stride(0)


def _device(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

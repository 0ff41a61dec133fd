"""kd_kl_hvp in Triton: the Hessian of a row's loss times a direction. Formulas: docs/math/kd_kl_hvp.md.

    h = H (w_s, w_t, w_tau_s, w_tau_t),  loss = weight * [ alpha * CE + (1 - alpha) * c * D ]

The distribution that weighs is called `from` (p: the teacher; for reverse_kl the student), the other `to` (q). Fused:
three softmaxes, every inner product with the direction, both products and the temperatures'. A program walks its row
three times in tiles of columns: the normalisers (online), the inner products, the products; rows of up to about 100 KB
come from memory once. Memory for a row of C classes of b bytes: reads s, t and the directions given (C b each), writes
C b for each product wanted. 16-bit types are storage only, cast right after their load.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.reference.kd_kl import Options, accumulate_dtype
from kdfast.triton.kd_kl import _device, _stride
from kdfast.triton.kd_kl_rows import INF, LN2, LOG2E, SOFT_CE, constant, from_to, per_row, row_labels

SCALE_TAU2, SCALE_PRODUCT = tl.constexpr(0), tl.constexpr(1)


@triton.jit
def _load(pointer, base, column, mask, other, ACC: tl.constexpr):
    """A tile of a tensor [rows, classes]; zeros where there is none."""
    if pointer is not None:
        return tl.load(pointer + base[:, None] + column[None, :], mask=mask, other=other).to(ACC)
    return tl.zeros(mask.shape, ACC)


@triton.jit
def _normaliser(maximum, total, x, k):
    """A softmax's (maximum, sum of exp2(k (x - maximum))) after one more tile."""
    new = tl.maximum(maximum, tl.max(x, 1))
    base = tl.where(new == -INF, 0.0, new)
    kept = tl.where(maximum == -INF, 0.0, total * tl.exp2((maximum - base) * k))
    return new, kept + tl.sum(tl.exp2((x - base[:, None]) * k[:, None]), 1)


@triton.jit
def _log_softmax(x, maximum, tau, log_z):
    return (x - maximum[:, None]) / tau[:, None] - log_z[:, None]


@triton.jit
def _unmasked(x):
    return tl.where(x == -INF, 0.0, x)


@triton.jit
def _scale(tau_s, tau_t, w_tau_s, w_tau_t, SCALE: tl.constexpr):
    """c, dc/dtau_s, dc/dtau_t, and the change of the three along the direction."""
    zero = tau_s * 0.0
    if SCALE == SCALE_TAU2:
        return tau_s * tau_s, 2.0 * tau_s, zero, 2.0 * tau_s * w_tau_s, 2.0 * w_tau_s, zero
    if SCALE == SCALE_PRODUCT:
        return tau_s * tau_t, tau_t, tau_s, tau_t * w_tau_s + tau_s * w_tau_t, w_tau_t, w_tau_s
    return zero + 1.0, zero, zero, zero, zero, zero


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def hvp_kernel(
    student, teacher,  # [rows, classes]
    temperature_s, temperature_t,  # [1] or [rows], or None
    labels,  # [rows], or None
    target,  # [rows, classes], or None
    weight,  # [rows], or None
    w_student, w_teacher,  # [rows, classes], or None
    w_temperature_s, w_temperature_t,  # [1] or [rows], or None
    h_student, h_teacher,  # [rows, classes], or None
    h_tau_s, h_tau_t,  # [rows], or None
    rows, classes, temperature_s_stride, temperature_t_stride, labels_stride, weight_stride,
    w_temperature_s_stride, w_temperature_t_stride,
    tau_s: tl.float64, tau_t: tl.float64, alpha: tl.float64, smoothing: tl.float64, ignore_index,
    DIVERGENCE: tl.constexpr, SCALE: tl.constexpr, SOFT: tl.constexpr, HARD: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    base = row * classes
    counts, coefficient, _label = row_labels(
        labels, labels_stride, weight, weight_stride, row, exists, classes, ignore_index, ACC
    )
    ts = per_row(temperature_s, temperature_s_stride, row, exists, tau_s, ACC)
    tt = per_row(temperature_t, temperature_t_stride, row, exists, tau_t, ACC)
    w_ts = per_row(w_temperature_s, w_temperature_s_stride, row, exists, 0.0, ACC)
    w_tt = per_row(w_temperature_t, w_temperature_t_stride, row, exists, 0.0, ACC)
    tau_from, tau_to = from_to(ts, tt, DIVERGENCE)
    w_tau_from, w_tau_to = from_to(w_ts, w_tt, DIVERGENCE)
    from_logits, to_logits = from_to(student, teacher, DIVERGENCE)
    k = 0.0 if DIVERGENCE == SOFT_CE else 1.0

    nothing = tl.zeros([ROWS], ACC)
    max_from, z_from, max_to, z_to, z_one, mass = nothing - INF, nothing, nothing - INF, nothing, nothing, nothing
    max_one = nothing - INF
    for begin in range(0, classes, COLS):
        column = begin + tl.arange(0, COLS)
        mask = counts[:, None] & (column < classes)[None, :]
        x = _load(from_logits, base, column, mask, -INF, ACC)
        y = _load(to_logits, base, column, mask, -INF, ACC)
        max_from, z_from = _normaliser(max_from, z_from, x, 1.0 / tau_from * LOG2E)
        max_to, z_to = _normaliser(max_to, z_to, y, 1.0 / tau_to * LOG2E)
        if HARD:
            s, _t = from_to(x, y, DIVERGENCE)
            max_one, z_one = _normaliser(max_one, z_one, s, nothing + LOG2E)
            if target is not None:
                mass += tl.sum(_load(target, base, column, mask, 0.0, ACC), 1)
    log_z_from, log_z_to = tl.log2(z_from) * LN2, tl.log2(z_to) * LN2

    divergence, from_dot, to_dot, to_dot_from, r_dot, one_dot = nothing, nothing, nothing, nothing, nothing, nothing
    mean_log_p, mean_log_q = nothing, nothing
    for begin in range(0, classes, COLS):
        column = begin + tl.arange(0, COLS)
        mask = counts[:, None] & (column < classes)[None, :]
        w_s = _load(w_student, base, column, mask, 0.0, ACC)
        if SOFT:
            w_from, w_to = from_to(w_s, _load(w_teacher, base, column, mask, 0.0, ACC), DIVERGENCE)
            log_p = _log_softmax(_load(from_logits, base, column, mask, -INF, ACC), max_from, tau_from, log_z_from)
            log_q = _log_softmax(_load(to_logits, base, column, mask, -INF, ACC), max_to, tau_to, log_z_to)
            p, q = tl.exp2(log_p * LOG2E), tl.exp2(log_q * LOG2E)
            dot_from = (w_from - _unmasked(log_p) * w_tau_from[:, None]) / tau_from[:, None]
            dot_to = (w_to - _unmasked(log_q) * w_tau_to[:, None]) / tau_to[:, None]
            weighed = tl.where(p == 0.0, 0.0, p * (k * _unmasked(log_p) - log_q))
            mean_log_p += tl.sum(p * _unmasked(log_p), 1)
            mean_log_q += tl.sum(q * _unmasked(log_q), 1)
            divergence += tl.sum(weighed, 1)
            r_dot += tl.sum(weighed * dot_from, 1)
            from_dot += tl.sum(p * dot_from, 1)
            to_dot += tl.sum(q * dot_to, 1)
            to_dot_from += tl.sum(p * dot_to, 1)
        if HARD:
            s = _load(student, base, column, mask, -INF, ACC)
            one_dot += tl.sum(tl.exp2((s - max_one[:, None]) * LOG2E) * w_s, 1)

    c, c_s, c_t, c_dot, c_s_dot, c_t_dot = _scale(ts, tt, w_ts, w_tt, SCALE)
    factor = coefficient * constant(1.0 - alpha, row, ACC)
    from_gradient = factor * (c_dot - c * w_tau_from / tau_from) / tau_from
    to_gradient = factor * (c_dot - c * w_tau_to / tau_to) / tau_to
    from_change, to_change = factor * c / tau_from, factor * c / tau_to
    d_dot = to_dot - to_dot_from + r_dot - divergence * from_dot
    if HARD:
        if target is None:
            mass = nothing + 1.0
        else:
            mass = constant(1.0 - smoothing, row, ACC) * mass + constant(smoothing, row, ACC)
        of_hard = coefficient * constant(alpha, row, ACC) * mass / z_one
        mean_one = one_dot / z_one

    inner_from, inner_to = nothing, nothing
    for begin in range(0, classes, COLS):
        column = begin + tl.arange(0, COLS)
        inside = exists[:, None] & (column < classes)[None, :]
        mask = inside & counts[:, None]
        w_s = _load(w_student, base, column, mask, 0.0, ACC)
        into_s, into_t = tl.zeros([ROWS, COLS], ACC), tl.zeros([ROWS, COLS], ACC)
        if SOFT:
            w_from, w_to = from_to(w_s, _load(w_teacher, base, column, mask, 0.0, ACC), DIVERGENCE)
            log_p = _log_softmax(_load(from_logits, base, column, mask, -INF, ACC), max_from, tau_from, log_z_from)
            log_q = _log_softmax(_load(to_logits, base, column, mask, -INF, ACC), max_to, tau_to, log_z_to)
            p, q = tl.exp2(log_p * LOG2E), tl.exp2(log_q * LOG2E)
            z, v = _unmasked(log_p), _unmasked(log_q)
            dot_from = (w_from - z * w_tau_from[:, None]) / tau_from[:, None] - from_dot[:, None]
            dot_to = (w_to - v * w_tau_to[:, None]) / tau_to[:, None] - to_dot[:, None]
            excess = tl.where(p == 0.0, 0.0, k * z - log_q - divergence[:, None])
            a, a_dot = q - p, q * dot_to - p * dot_from
            b = p * excess
            b_dot = dot_from * b + p * (k * dot_from - dot_to - d_dot[:, None])
            into_from = from_gradient[:, None] * b + from_change[:, None] * b_dot
            into_to = to_gradient[:, None] * a + to_change[:, None] * a_dot
            if h_tau_s is not None or h_tau_t is not None:  # less the means: what rounding left in sum b does no harm
                z, v = z - mean_log_p[:, None], v - mean_log_q[:, None]
                from_term = from_gradient[:, None] * b * z + from_change[:, None] * (b_dot * z + b * dot_from)
                to_term = to_gradient[:, None] * a * v + to_change[:, None] * (a_dot * v + a * dot_to)
                inner_from += tl.sum(tl.where(mask, from_term, 0.0), 1)
                inner_to += tl.sum(tl.where(mask, to_term, 0.0), 1)
            into_s, into_t = from_to(into_from, into_to, DIVERGENCE)
        if HARD:
            s = _load(student, base, column, mask, -INF, ACC)
            into_s += of_hard[:, None] * tl.exp2((s - max_one[:, None]) * LOG2E) * (w_s - mean_one[:, None])
        # An ignored row has products 0, whatever its logits hold.
        at = base[:, None] + column[None, :]
        if h_student is not None:
            into_s = tl.where(mask, into_s, 0.0)
            tl.store(h_student + at, into_s.to(h_student.dtype.element_ty), mask=inside)
        if h_teacher is not None:
            into_t = tl.where(mask, into_t, 0.0)
            tl.store(h_teacher + at, into_t.to(h_teacher.dtype.element_ty), mask=inside)

    inner_s, inner_t = from_to(inner_from, inner_to, DIVERGENCE)
    if h_tau_s is not None:
        value = factor * (c_s_dot * divergence + c_s * d_dot) - inner_s
        tl.store(h_tau_s + row, tl.where(counts, value, 0.0), mask=exists)
    if h_tau_t is not None:
        value = factor * (c_t_dot * divergence + c_t * d_dot) - inner_t
        tl.store(h_tau_t + row, tl.where(counts, value, 0.0), mask=exists)


def tile(classes: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program. A thread holds 4 columns of four tensors, in fp64 2: more spills."""
    widest = 1024 if dtype == torch.float64 else 2048
    columns = min(max(16, triton.next_power_of_2(classes)), widest)
    rows = max(1, 64 // columns)
    return rows, columns, max(2, rows * columns // (64 if dtype == torch.float64 else 128))


def kd_kl_hvp(
    student: Tensor,  # [rows, classes]
    teacher: Tensor,  # [rows, classes]
    student_temperature: Tensor | None,  # [1] or [rows]
    teacher_temperature: Tensor | None,  # [1] or [rows]
    labels: Tensor | None,  # [rows]
    target: Tensor | None,  # [rows, classes]
    weight: Tensor | None,  # [rows]
    w_student: Tensor | None,  # [rows, classes]
    w_teacher: Tensor | None,  # [rows, classes]
    w_tau_s: Tensor | None,  # as student_temperature
    w_tau_t: Tensor | None,  # as teacher_temperature
    *options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [rows, classes] twice, [rows] twice; [0] where absent
    """The kernel of the op of this name; its schema stands in kdfast/ops/kd_kl_hvp.py."""
    *options, student_wanted, teacher_wanted = options
    o = Options(*options)
    rows, classes = student.shape
    accumulate = accumulate_dtype(student.dtype)
    h_student = student.new_empty(student.shape if student_wanted else 0)
    h_teacher = teacher.new_empty(teacher.shape if teacher_wanted else 0)
    h_tau_s, h_tau_t = (
        student.new_empty(0 if tau is None else rows, dtype=accumulate)
        for tau in (student_temperature, teacher_temperature)
    )
    outputs = (h_student, h_teacher, h_tau_s, h_tau_t)
    if rows == 0:
        return outputs
    strides = [_stride(x) for x in (student_temperature, teacher_temperature, labels, weight, w_tau_s, w_tau_t)]
    tile_rows, tile_columns, warps = tile(classes, student.dtype)
    with _device(student):
        hvp_kernel[(triton.cdiv(rows, tile_rows),)](
            student, teacher, student_temperature, teacher_temperature, labels, target, weight,
            w_student, w_teacher, w_tau_s, w_tau_t, *(x if x.numel() else None for x in outputs),
            rows, classes, *strides, o.tau_s, o.tau_t, o.alpha, o.label_smoothing, o.ignore_index,
            DIVERGENCE=o.divergence, SCALE=o.scale, SOFT=o.alpha < 1, HARD=o.alpha > 0,
            ACC=tl.float64 if accumulate == torch.float64 else tl.float32,
            ROWS=tile_rows, COLS=tile_columns, num_warps=warps,
        )  # fmt: skip
    return outputs

"""kd_kl in Triton: row statistics forward, elementwise backward. The definition: kdfast/reference/kd_kl.py.

    loss = weight * [ alpha * CE + (1 - alpha) * c * D ],   D = sum p (k log p - log q)

The distribution that weighs is called `from` (p: the teacher; for reverse_kl the student), the other `to` (q)

    dD / d to logits = q - p      dD / d from logits = p (r - D),  r = k log p - log q

The formulas of jsd and dkd: kdfast/reference/kd_kl_divergences.py. jsd needs one more sweep forward, of the mixture.
For dkd the sums leave the label out, so that the D above is its N; the label's part comes from its two logits.

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
from kdfast.triton.kd_kl_rows import (
    DKD,
    INF,
    JSD,
    LN2,
    LOG2E,
    SOFT_CE,
    cap,
    constant,
    decouple,
    from_to,
    gradients,
    load_tile,
    logits,
    mixture_means,
    per_row,
    put,
    raise_maximum,
    ratio,
    row_labels,
    scale_factor,
    uncap,
)


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
    beta: tl.float64, target_weight: tl.float64, softcap: tl.float64, logit_scale: tl.float64,
    DIVERGENCE: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr, TEMPERATURE_GRAD: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    base = row * classes
    counts, coefficient, label = row_labels(
        labels, labels_stride, weight, weight_stride, row, exists, classes, ignore_index, ACC
    )
    ts = per_row(temperature_s, temperature_s_stride, row, exists, tau_s, ACC)
    tt = per_row(temperature_t, temperature_t_stride, row, exists, tau_t, ACC)
    k_from, k_to = from_to(1.0 / ts * LOG2E, 1.0 / tt * LOG2E, DIVERGENCE)
    softcap, logit_scale = constant(softcap, row, ACC), constant(logit_scale, row, ACC)

    nothing = tl.zeros([ROWS], ACC)
    from_max, from_sum, to_max, to_sum, cross = nothing - INF, nothing, nothing - INF, nothing, nothing
    one_max, one_sum, finite, finite_dot = nothing - INF, nothing, nothing, nothing
    mass, dot = nothing, nothing
    for begin in range(0, classes, COLS):
        column = begin + tl.arange(0, COLS)
        mask = counts[:, None] & (column < classes)[None, :]
        s = logits(student, base, column, mask, softcap, logit_scale, ACC, CAP)
        if SOFT:
            x, y = from_to(s, logits(teacher, base, column, mask, softcap, logit_scale, ACC, CAP), DIVERGENCE)
            if DIVERGENCE == DKD:
                is_label = column[None, :] == label[:, None]
                x, y = tl.where(is_label, -INF, x), tl.where(is_label, -INF, y)
            weighs = from_sum
            from_max, from_base, from_factor, from_distance = raise_maximum(from_max, tl.max(x, 1), k_from)
            to_max, to_base, to_factor, to_distance = raise_maximum(to_max, tl.max(y, 1), k_to)
            moved = from_factor * (cross - weighs * ratio(from_distance, to_distance, DIVERGENCE))
            y_from = (x - from_base[:, None]) * k_from[:, None]
            y_to = (y - to_base[:, None]) * k_to[:, None]
            e = tl.exp2(y_from)
            from_sum = from_sum * from_factor + tl.sum(e, 1)
            to_sum = to_sum * to_factor + tl.sum(tl.exp2(y_to), 1)
            terms = tl.where(e == 0.0, 0.0, e * ratio(y_from, y_to, DIVERGENCE))  # 0 log 0 = 0
            cross = tl.where(from_factor == 0.0, 0.0, moved) + tl.sum(terms, 1)
        if HARD:
            one_max, one_base, one_factor, one_distance = raise_maximum(one_max, tl.max(s, 1), LOG2E)
            y_one = (s - one_base[:, None]) * LOG2E
            one_sum = one_sum * one_factor + tl.sum(tl.exp2(y_one), 1)
            if SMOOTH:
                unmasked = s != -INF
                finite_dot += tl.sum(tl.where(unmasked, y_one, 0.0), 1) - finite * one_distance
                finite += tl.sum(unmasked.to(ACC), 1)
            if target is not None:
                w = load_tile(target, base, column, mask, 0.0, ACC)
                dot += tl.sum(tl.where(w == 0.0, 0.0, w * y_one), 1) - mass * one_distance
                mass += tl.sum(w, 1)

    value, max_s, max_t, log2_z_u, log2_z_v, log2_z_one = nothing, one_max, nothing, nothing, nothing, nothing
    divergence, by_tau_s, by_tau_t = nothing, nothing, nothing
    if SOFT:
        keep = constant(1.0 - alpha, row, ACC)
        c, c_s, c_t = scale_factor(ts, tt, SCALE)
        log2_z_from, log2_z_to = tl.log2(from_sum), tl.log2(to_sum)
        # One logarithm of a ratio rather than two logarithms: digits for distributions that nearly agree.
        if DIVERGENCE == SOFT_CE:
            divergence = (cross / from_sum + tl.log2(to_sum)) * LN2
        else:
            divergence = (cross / from_sum + tl.log2(to_sum / from_sum)) * LN2
        from_base, to_base, from_mean, to_mean = from_max, to_max, divergence, nothing
        from_odds, to_odds = nothing, nothing
        beta = constant(beta, row, ACC)
        if DIVERGENCE == JSD:
            from_mean, to_mean, divergence = mixture_means(
                student, teacher, base, counts, classes, softcap, logit_scale, from_max, to_max, k_from, k_to,
                log2_z_from, log2_z_to, beta, ACC, CAP, COLS,
            )  # fmt: skip
        total = divergence
        if DIVERGENCE == DKD:
            divergence = tl.where(to_sum == 0.0, INF, divergence)  # others that only the student masks
            divergence = tl.where(from_sum == 0.0, 0.0, divergence)
            from_base, to_base, of_target, from_odds, to_odds, _label_s = decouple(
                student, teacher, base, label, counts & (label >= 0) & (label < classes), softcap, logit_scale,
                from_max, to_max, k_from, k_to, log2_z_from, log2_z_to, constant(target_weight, row, ACC), ACC, CAP,
            )  # fmt: skip
            total = of_target + beta * divergence
            from_mean = divergence
        value = keep * c * total
        max_s, max_t = from_to(from_max, to_max, DIVERGENCE)
        log2_z_u, log2_z_v = from_to(log2_z_from, log2_z_to, DIVERGENCE)
        if TEMPERATURE_GRAD:
            # <dD/du, u>: the gradients sum to zero over the row, so u and v may be measured from their maxima.
            by_from, by_to = nothing, nothing
            if DIVERGENCE == DKD:
                beta = tl.where(from_sum == 0.0, 0.0, beta)
                log2_z_from = tl.where(from_sum == 0.0, 0.0, log2_z_from)
                log2_z_to = tl.where(to_sum == 0.0, 0.0, log2_z_to)
            for begin in range(0, classes, COLS):
                column = begin + tl.arange(0, COLS)
                mask = counts[:, None] & (column < classes)[None, :]
                s = logits(student, base, column, mask, softcap, logit_scale, ACC, CAP)
                x, y = from_to(s, logits(teacher, base, column, mask, softcap, logit_scale, ACC, CAP), DIVERGENCE)
                g_from, g_to, y_from, y_to = gradients(
                    x, y, column[None, :] == label[:, None], from_base, to_base, k_from, k_to, log2_z_from, log2_z_to,
                    from_mean, to_mean, from_odds, to_odds, beta, DIVERGENCE,
                )  # fmt: skip
                by_from += tl.sum(tl.where(g_from == 0.0, 0.0, g_from * y_from), 1)
                by_to += tl.sum(tl.where(y_to == -INF, 0.0, g_to * y_to), 1)
            inner_s, inner_t = from_to(by_from, by_to, DIVERGENCE)
            by_tau_s = coefficient * keep * (c_s * total - c * inner_s / ts * LN2)
            by_tau_t = coefficient * keep * (c_t * total - c * inner_t / tt * LN2)
        if DIVERGENCE == JSD:
            divergence = to_mean  # what the student's gradient needs; the teacher's mean is summed again if asked for
    if HARD:
        log2_z_one = tl.log2(one_sum)
        if target is None:  # a label is a target of mass one
            at_label = counts & (label >= 0) & (label < classes)
            logit = cap(tl.load(student + base + label, mask=at_label, other=0.0).to(ACC), softcap, logit_scale, CAP)
            mass, dot = nothing + 1.0, (logit - tl.where(one_max == -INF, 0.0, one_max)) * LOG2E
        keep_hard = constant(1.0 - smoothing, row, ACC)
        hard = tl.where(keep_hard > 0.0, keep_hard * (mass * log2_z_one - dot), 0.0)
        if SMOOTH:
            hard += constant(smoothing, row, ACC) * (log2_z_one - finite_dot / finite)
        value += constant(alpha, row, ACC) * hard * LN2
    tl.store(loss + row, tl.where(counts, coefficient * value, 0.0), mask=exists)
    put(stats, 0, max_s, row, counts, exists)
    put(stats, 1, max_t, row, counts, exists)
    put(stats, 2, log2_z_u * LN2, row, counts, exists)
    put(stats, 3, log2_z_v * LN2, row, counts, exists)
    put(stats, 4, log2_z_one * LN2, row, counts, exists)
    put(stats, 5, divergence, row, counts, exists)
    put(stats, 6, by_tau_s, row, counts, exists)
    put(stats, 7, by_tau_t, row, counts, exists)


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
    beta: tl.float64, target_weight: tl.float64, softcap: tl.float64, logit_scale: tl.float64,
    DIVERGENCE: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    SOFT: tl.constexpr, HARD: tl.constexpr, SMOOTH: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    base = row * classes
    counts, coefficient, label = row_labels(
        labels, labels_stride, weight, weight_stride, row, exists, classes, ignore_index, ACC
    )
    ts = per_row(temperature_s, temperature_s_stride, row, exists, tau_s, ACC)
    tt = per_row(temperature_t, temperature_t_stride, row, exists, tau_t, ACC)
    factor = coefficient * tl.load(grad + row * grad_stride, mask=exists, other=0.0).to(ACC)
    softcap, logit_scale = constant(softcap, row, ACC), constant(logit_scale, row, ACC)
    max_s = tl.load(stats + row * 8 + 0, mask=counts, other=0.0)
    if SOFT:
        keep = constant(1.0 - alpha, row, ACC)
        c, _c_s, _c_t = scale_factor(ts, tt, SCALE)
        k_from, k_to = from_to(1.0 / ts * LOG2E, 1.0 / tt * LOG2E, DIVERGENCE)
        max_t = tl.load(stats + row * 8 + 1, mask=counts, other=0.0)
        from_max, to_max = from_to(max_s, max_t, DIVERGENCE)
        log_z_u = tl.load(stats + row * 8 + 2, mask=counts, other=0.0)
        log_z_v = tl.load(stats + row * 8 + 3, mask=counts, other=0.0)
        log2_z_from, log2_z_to = from_to(log_z_u * LOG2E, log_z_v * LOG2E, DIVERGENCE)
        from_mean = tl.load(stats + row * 8 + 5, mask=counts, other=0.0)
        from_base, to_base, to_mean, from_odds, to_odds = from_max, to_max, from_mean, from_mean, from_mean
        beta = constant(beta, row, ACC)
        if DIVERGENCE == DKD:  # the statistics are the others'
            from_base, to_base, _of_target, from_odds, to_odds, label_s = decouple(
                student, teacher, base, label, counts & (label >= 0) & (label < classes), softcap, logit_scale,
                from_max, to_max, k_from, k_to, log2_z_from, log2_z_to, constant(target_weight, row, ACC), ACC, CAP,
            )  # fmt: skip
            beta = tl.where(from_max == -INF, 0.0, beta)
            log2_z_from = tl.where(from_max == -INF, 0.0, log2_z_from)
            log2_z_to = tl.where(to_max == -INF, 0.0, log2_z_to)
            max_s = tl.maximum(max_s, label_s)
        if (DIVERGENCE == JSD) and (teacher_grad is not None):
            from_mean, _to_mean, _divergence = mixture_means(
                student, teacher, base, counts, classes, softcap, logit_scale, from_max, to_max, k_from, k_to,
                log2_z_from, log2_z_to, beta, ACC, CAP, COLS,
            )  # fmt: skip
        of_from, of_to = from_to(keep * factor * c / ts, keep * factor * c / tt, DIVERGENCE)
    if HARD:
        log2_z = tl.load(stats + row * 8 + 4, mask=counts, other=0.0) * LOG2E
        of_hard = factor * constant(alpha, row, ACC)
        keep_hard = constant(1.0 - smoothing, row, ACC)
        mass = tl.zeros([ROWS], ACC) + 1.0  # of a label, with or without smoothing
        if SMOOTH or target is not None:  # the row's sums first; then one program has the whole row
            finite, target_sum = tl.zeros([ROWS], ACC), tl.zeros([ROWS], ACC)
            for begin in range(0, classes, COLS):
                column = begin + tl.arange(0, COLS)
                mask = counts[:, None] & (column < classes)[None, :]
                if SMOOTH:
                    s = load_tile(student, base, column, mask, -INF, ACC)
                    finite += tl.sum((s != -INF).to(ACC), 1)
                if target is not None:
                    target_sum += tl.sum(load_tile(target, base, column, mask, 0.0, ACC), 1)
            if target is not None:
                mass = keep_hard * target_sum + constant(smoothing, row, ACC)
            if SMOOTH:
                spread = constant(smoothing, row, ACC) / finite

    for begin in range(tl.program_id(1) * COLS, classes, tl.num_programs(1) * COLS):
        column = begin + tl.arange(0, COLS)
        inside = exists[:, None] & (column < classes)[None, :]
        mask = inside & counts[:, None]
        s = logits(student, base, column, mask, softcap, logit_scale, ACC, CAP)
        ds = tl.zeros([ROWS, COLS], ACC)
        dt = tl.zeros([ROWS, COLS], ACC)
        if SOFT:
            t = logits(teacher, base, column, mask, softcap, logit_scale, ACC, CAP)
            x, y = from_to(s, t, DIVERGENCE)
            g_from, g_to, _y_from, _y_to = gradients(
                x, y, column[None, :] == label[:, None], from_base, to_base, k_from, k_to, log2_z_from, log2_z_to,
                from_mean, to_mean, from_odds, to_odds, beta, DIVERGENCE,
            )  # fmt: skip
            ds, dt = from_to(of_from[:, None] * g_from, of_to[:, None] * g_to, DIVERGENCE)
            dt = uncap(dt, t, softcap, logit_scale, CAP)
        if HARD:
            if target is not None:
                w = load_tile(target, base, column, mask, 0.0, ACC)
            else:
                w = (column[None, :] == label[:, None]).to(ACC)
            probability = tl.exp2((s - max_s[:, None]) * LOG2E - log2_z[:, None])
            hard = mass[:, None] * probability - keep_hard[:, None] * w
            if SMOOTH:
                hard -= tl.where(s == -INF, 0.0, spread[:, None])
            ds += of_hard[:, None] * hard
        ds = uncap(ds, s, softcap, logit_scale, CAP)
        # An ignored row has gradient 0, whatever its logits hold.
        at = base[:, None] + column[None, :]
        if student_grad is not None:
            ds = tl.where(mask, ds, 0.0)
            tl.store(student_grad + at, ds.to(student_grad.dtype.element_ty), mask=inside)
        if teacher_grad is not None:
            dt = tl.where(mask, dt, 0.0)
            tl.store(teacher_grad + at, dt.to(teacher_grad.dtype.element_ty), mask=inside)


def tile(classes: int, dtype: torch.dtype, divergence: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program: several whole rows of few classes, one row of more, of many 4096 columns
    at a time (fp64: half, jsd and dkd: a quarter). A thread holds 8 columns or the scalars of 2 rows: more spills."""
    widest = 4096 // (2 if dtype == torch.float64 else 1) // (4 if divergence >= JSD.value else 1)
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
    tile_rows, tile_columns, warps = tile(classes, student.dtype, o.divergence)
    with _device(student):
        forward_kernel[(triton.cdiv(rows, tile_rows),)](
            student, teacher, student_temperature, teacher_temperature, labels, target, weight, loss, stats,
            rows, classes, *strides, o.tau_s, o.tau_t, o.alpha, o.label_smoothing, o.ignore_index,
            o.beta, o.target_weight, o.softcap, o.logit_scale,
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
    tile_rows, tile_columns, warps = tile(classes, student.dtype, o.divergence)
    constants = _constants(o, stats.dtype)
    sums_first = constants["HARD"] and (constants["SMOOTH"] or target is not None)
    sums_first |= o.divergence == JSD.value and constants["SOFT"] and wants_teacher
    enough = max(1, 1024 // rows)  # programs that fill a GPU where rows are few
    parts = 1 if sums_first else min(enough, triton.cdiv(classes, tile_columns))
    with _device(student):
        backward_kernel[(triton.cdiv(rows, tile_rows), parts)](
            grad, student, teacher, student_temperature, teacher_temperature, labels, target, weight, stats,
            ds if wants_student else None, dt if wants_teacher else None,
            rows, classes, *strides, o.tau_s, o.tau_t, o.alpha, o.label_smoothing, o.ignore_index,
            o.beta, o.target_weight, o.softcap, o.logit_scale,
            **constants, ROWS=tile_rows, COLS=tile_columns, num_warps=warps,
        )  # fmt: skip
    return ds, dt


def _constants(o: Options, accumulate: torch.dtype) -> dict:
    return {
        "DIVERGENCE": o.divergence,
        "SCALE": o.scale,
        "CAP": 2 if o.softcap > 0 else int(o.logit_scale != 1),  # CAPPED, SCALED, or neither
        "SOFT": o.alpha < 1,
        "HARD": o.alpha > 0,
        "SMOOTH": o.label_smoothing > 0,
        "ACC": tl.float64 if accumulate == torch.float64 else tl.float32,
    }


def _stride(x: Tensor | None) -> int:
    return 0 if x is None or x.numel() == 1 else x.stride(0)


def _device(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

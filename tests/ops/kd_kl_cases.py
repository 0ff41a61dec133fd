"""What every GPU version of kd_kl has to get right: cases, inputs, the truth, and the comparison.

The functions under test are the two kernels, with the arguments of the op's schema: `forward(...) ->
(loss, stats)` and `backward(...) -> (ds, dt)`. They are Triton's launchers (on a GPU, or interpreted on a
CPU) or the dispatcher's.
"""

import math
from dataclasses import dataclass

import torch

from kdfast.reference.kd_kl import STATS, Options, accumulate_dtype, cap, kd_kl_gradient
from kdfast.reference.kd_kl import kd_kl as definition
from tests.laws import SANITIZED

INF, NAN = math.inf, math.nan
NAMES = ("student", "teacher", "student_temperature", "teacher_temperature")


TAUS = Options(4.0, 2.0)  # student and teacher differ


@dataclass(frozen=True)
class Case:
    """One call: its regime in a word, its shape, its options, and which optional tensors it is given."""

    regime: str
    rows: int
    classes: int
    options: Options = TAUS
    dtype: torch.dtype = torch.float32
    hard: str = ""  # "", "labels", "target", "ignored": what the hard-label term is given
    temperatures: str = ""  # "", "one", "rows": numbers, or tensors of one value or one a row
    weight: bool = False
    masked: bool = False  # some classes -inf in both, some in the one that weighs alone

    def __str__(self) -> str:
        return f"{self.regime}-{self.rows}x{self.classes}-{str(self.dtype).removeprefix('torch.')}"


REVERSE, SOFT_CE, JSD, DKD = {"divergence": 1}, {"divergence": 2}, {"divergence": 3}, {"divergence": 4, "beta": 8.0}
PRODUCT, UNSCALED = {"scale": 1}, {"scale": 2}


def _options(tau_s=TAUS.tau_s, tau_t=TAUS.tau_t, **rest) -> Options:
    return Options(tau_s, tau_t, **rest)


# Each line is there for its regime; what varies beside it varies so that no two options meet only once.
CASES = [
    # The three divergences and scales, the divergence alone.
    Case("forward_kl", 3, 37),
    Case("reverse_kl", 3, 37, _options(**REVERSE, **PRODUCT), temperatures="rows"),
    Case("soft_ce", 3, 37, _options(**SOFT_CE, **UNSCALED), temperatures="one"),
    # Temperatures with gradient, for each scale.
    Case("tau2_rows", 5, 20, temperatures="rows", weight=True),
    Case("product_one", 5, 20, _options(**PRODUCT, **SOFT_CE), temperatures="one"),
    Case("none_rows", 5, 20, _options(**UNSCALED, **REVERSE), temperatures="rows", hard="labels"),
    # Hard labels: shares, smoothing, probabilities, rows left out.
    Case("labels", 4, 50, _options(alpha=0.5), hard="labels", temperatures="one"),
    Case("labels_reverse_smoothed", 4, 50, _options(alpha=0.3, label_smoothing=0.1, **REVERSE), hard="labels"),
    Case("labels_only", 4, 50, _options(alpha=1.0, label_smoothing=0.2), hard="labels", temperatures="rows"),
    Case("labels_unused", 4, 50, _options(alpha=0.0), hard="ignored"),
    Case("target", 4, 50, _options(alpha=0.5), hard="target", weight=True),
    Case("target_smoothed_reverse", 4, 50, _options(alpha=0.7, label_smoothing=0.3, **REVERSE), hard="target"),
    Case("target_only", 4, 50, _options(alpha=1.0, **SOFT_CE), hard="target"),
    Case("all_smoothing", 4, 50, _options(alpha=0.5, label_smoothing=1.0), hard="labels", masked=True),
    Case("ignored", 6, 33, _options(alpha=0.5), hard="ignored", temperatures="rows", weight=True),
    # Masked classes.
    Case("masked", 4, 29, masked=True, temperatures="rows"),
    Case("masked_reverse", 4, 29, _options(alpha=0.4, **REVERSE), hard="labels", temperatures="one", masked=True),
    Case("masked_smoothed", 4, 29, _options(alpha=0.4, label_smoothing=0.1), masked=True, hard="labels"),
    # Storage types; even and odd numbers of classes for aligned and unaligned rows.
    Case("bf16", 3, 64, _options(alpha=0.5), torch.bfloat16, "labels", temperatures="one"),
    Case("bf16_odd", 3, 45, _options(alpha=0.5, **REVERSE), torch.bfloat16, "target"),
    Case("fp16", 3, 61, _options(alpha=0.2, label_smoothing=0.1), torch.float16, "target", weight=True),
    Case("fp64", 3, 31, _options(alpha=0.5, **PRODUCT), torch.float64, "labels", temperatures="rows"),
    Case("fp64_taus", 3, 31, _options(0.1, 1 / 3, alpha=0.7, label_smoothing=0.1), torch.float64, "labels"),
    # Shapes: one class, one row, the widest that share a block, wide rows of several tiles.
    Case("one_class", 3, 1, _options(alpha=0.5), hard="labels", temperatures="one"),
    Case("one_row", 1, 10, temperatures="one"),
    Case("many_rows", 130, 7, _options(alpha=0.9), hard="ignored"),
    Case("1000", 3, 1000, _options(alpha=0.5), hard="labels", temperatures="rows"),
    Case("1000_bf16", 3, 1000, _options(alpha=0.5, label_smoothing=0.1, **REVERSE), torch.bfloat16, "target"),
    Case("1000_fp64", 3, 1000, _options(alpha=0.5, **SOFT_CE), torch.float64, "labels", temperatures="one"),
    Case("wide", 2, 9001, _options(alpha=0.5, **SOFT_CE), hard="labels", temperatures="rows"),
    Case("wide_reverse_bf16", 2, 8200, _options(**REVERSE), torch.bfloat16, temperatures="one"),
    Case("wide_target", 2, 5003, _options(alpha=0.6, label_smoothing=0.1), hard="target", masked=True),
    Case("wide_fp64", 2, 4099, _options(alpha=0.5), torch.float64, "ignored", masked=True),
    # The mixture, and the label apart: alone, with hard labels, masked, stored otherwise, in several tiles.
    Case("jsd", 3, 37, _options(**JSD), temperatures="rows"),
    Case("jsd_labels", 4, 50, _options(alpha=0.5, label_smoothing=0.1, beta=0.2, **JSD), hard="labels", weight=True),
    Case("jsd_masked", 4, 29, _options(alpha=0.3, **JSD, **PRODUCT), hard="target", masked=True, temperatures="one"),
    Case("jsd_bf16", 3, 45, _options(beta=0.9, **JSD, **UNSCALED), torch.bfloat16, "ignored"),
    Case("jsd_wide", 2, 9001, _options(**JSD), hard="labels", temperatures="rows"),
    Case("jsd_wide_fp64", 2, 4099, _options(alpha=0.5, **JSD), torch.float64, "labels", masked=True),
    Case("dkd", 3, 37, _options(**DKD), hard="labels", temperatures="rows"),
    Case("dkd_hard", 6, 33, _options(alpha=0.4, target_weight=2.0, **DKD, **PRODUCT), hard="ignored", weight=True),
    Case("dkd_masked", 4, 29, _options(alpha=0.3, **DKD), hard="labels", masked=True, temperatures="one"),
    Case("dkd_fp16", 3, 61, _options(target_weight=0.0, **DKD, **UNSCALED), torch.float16, "labels"),
    Case("dkd_one_class", 3, 1, _options(alpha=0.5, **DKD), hard="labels", temperatures="one"),
    Case("dkd_wide_bf16", 2, 8200, _options(**DKD), torch.bfloat16, "labels", temperatures="one"),
    Case("dkd_wide_fp64", 2, 4099, _options(alpha=0.5, **DKD), torch.float64, "ignored", masked=True),
    # Logits capped and scaled.
    Case("capped", 5, 20, _options(alpha=0.5, softcap=5.0, logit_scale=0.5), hard="labels", temperatures="rows"),
    Case("capped_reverse", 4, 50, _options(softcap=30.0, **REVERSE), masked=True, temperatures="one", weight=True),
    Case("capped_jsd_bf16", 3, 64, _options(alpha=0.2, softcap=8.0, **JSD), torch.bfloat16, "labels"),
    Case("capped_dkd_fp64", 4, 31, _options(softcap=6.0, **DKD), torch.float64, "ignored", temperatures="rows"),
    Case("capped_wide", 2, 5003, _options(softcap=30.0, alpha=0.5, label_smoothing=0.1), hard="target", masked=True),
    Case("scaled", 4, 50, _options(logit_scale=0.25, alpha=0.5), hard="target", temperatures="one", masked=True),
]  # fmt: skip


def make(case: Case, device="cpu") -> tuple:
    """(student, teacher, tau_s, tau_t, labels, target, weight) of a case, the same on every device."""
    generator = torch.Generator().manual_seed(case.rows * 1009 + case.classes)
    rows, classes, accumulate = case.rows, case.classes, accumulate_dtype(case.dtype)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, teacher = 5 * normal(rows, classes), 5 * normal(rows, classes)
    labels = torch.randint(classes, (rows,), generator=generator)
    if case.masked:
        hidden = torch.rand(rows, classes, generator=generator) < 0.2
        hidden.scatter_(1, labels.unsqueeze(1), False)
        student[hidden] = teacher[hidden] = -INF
        more = torch.rand(rows, classes, generator=generator) < 0.1
        more.scatter_(1, labels.unsqueeze(1), False)
        (student if case.options.divergence == 1 else teacher)[more] = -INF
    if case.hard == "ignored":
        labels[::3] = case.options.ignore_index
    tau_s = tau_t = None
    if case.temperatures:
        size = rows if case.temperatures == "rows" else 1
        tau_s, tau_t = (0.5 + 4 * torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(2))
    target = 2 * torch.rand(rows, classes, generator=generator, dtype=torch.float64)
    target[target < 1] = 0  # zeros among them, and a mass that is not one
    target = (target / classes).masked_fill(student == -INF, 0)
    weight = torch.rand(rows, generator=generator, dtype=torch.float64) if case.weight else None
    return (
        student.to(device, case.dtype),
        teacher.to(device, case.dtype),
        None if tau_s is None else tau_s.to(device, accumulate),
        None if tau_t is None else tau_t.to(device, accumulate),
        labels.to(device) if case.hard in ("labels", "ignored") else None,
        target.to(device, accumulate) if case.hard == "target" else None,
        None if weight is None else weight.to(device, accumulate),
    )


def autograd(tensors: tuple, options: Options, grad: torch.Tensor, dtype: torch.dtype | None = None) -> list:
    """[loss, ds, dt, dtau_s, dtau_t] as PyTorch derives the definition, in `dtype` or the inputs' own."""
    inputs = [x if x is None or not x.is_floating_point() else x.detach().to(dtype or x.dtype) for x in tensors]
    leaves = [x.requires_grad_() for x in inputs[:4] if x is not None]
    loss = definition(*inputs, options)
    grads = torch.autograd.grad(loss, leaves, grad.to(loss.dtype), allow_unused=True)
    given = iter(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))
    return [loss.detach(), *(None if x is None else next(given) for x in inputs[:4])]


def run(forward, backward, tensors: tuple, options: Options, grad: torch.Tensor) -> tuple[list, torch.Tensor]:
    """([loss, ds, dt, dtau_s, dtau_t], stats) by the kernels under test."""
    temperature_grad = tensors[2] is not None
    loss, stats = forward(*tensors, *options, temperature_grad)
    ds, dt = backward(grad, *tensors, stats, *options, True, True)
    by_tau = [None, None]
    if temperature_grad:
        by_tau = [grad * stats[:, 6 + i] for i in range(2)]
        by_tau = [
            g if x.numel() == g.numel() else g.sum().reshape(1) for g, x in zip(by_tau, tensors[2:4], strict=True)
        ]
    return [loss, ds, dt, *by_tau], stats


def check(case: Case, forward, backward, device="cpu", truncates: bool = False) -> None:
    """Values, gradients and statistics: at most twice the error of PyTorch in the same types, against fp64.
    `truncates`: what is stored in bf16 was cut off rather than rounded."""
    tensors = make(case, device)
    grad = torch.linspace(-1.5, 2.0, case.rows, dtype=accumulate_dtype(case.dtype)).to(device)
    truth = autograd(tensors, case.options, grad, torch.float64)
    eager = autograd(tensors, case.options, grad)
    ours, stats = run(forward, backward, tensors, case.options, grad)
    # What a number is made of: a temperature's gradient is a sum that all but cancels, of dD/du * u.
    capped = (*(cap(z.double(), case.options) for z in tensors[:2]), *tensors[2:])
    by_capped = autograd(capped, case.options._replace(softcap=0.0, logit_scale=1.0), grad, torch.float64)[1:3]
    terms = [
        None if tau is None else ((g * z.masked_fill(z == -INF, 0)).abs().sum(-1) / tau.double()).sum()
        for g, z, tau in zip(by_capped, capped[:2], tensors[2:4], strict=True)
    ]
    magnitudes = [x if x is None else x.abs().max() for x in truth[:3]] + terms
    for name, x, t, e, m in zip(("loss", *NAMES), ours, truth, eager, magnitudes, strict=True):
        if t is not None:
            assert x.shape == e.shape, name
            assert x.dtype == e.dtype, name
            compare(name, x, t, e, m.item(), truncates)
    statistics(case, stats, tensors)


def compare(name: str, ours, truth, eager, magnitude: float, truncates: bool) -> None:
    """error <= 2 x eager's + a few roundings of what the number is made of, all in the largest element."""
    assert truth.isfinite().all(), f"{name}: a case must have a finite truth"
    error, bar = ((x.double() - truth).abs().max().item() for x in (ours, eager))
    # PyTorch may be exact where we round: terms are up to the magnitude, made of probabilities up to one. In fp64 the
    # truth is PyTorch itself, and two ways to write it differ by more. A sanitized build sums in one long chain.
    rounding = torch.finfo(torch.float32).eps if accumulate_dtype(ours.dtype) == torch.float32 else 1e-13
    floor = rounding * ((64 if SANITIZED else 16) * magnitude + 4)
    if truncates and ours.dtype == torch.bfloat16:
        floor += magnitude * torch.finfo(torch.bfloat16).eps
    assert error <= 2 * bar + floor, f"{name}: error {error:.3g}, PyTorch's own {bar:.3g}, floor {floor:.3g}"


def statistics(case: Case, stats: torch.Tensor, tensors: tuple) -> None:
    """The columns the loss needs, of the rows that count; zero everywhere else. For jsd and dkd they are a kernel's
    own affair, as the backward they are for."""
    assert stats.shape == (case.rows, STATS)
    student, teacher, tau_s, tau_t, labels, *_ = (x if x is None else x.double().cpu() for x in tensors)
    o = case.options
    if o.divergence > 2 and o.alpha < 1:
        return
    student, teacher = cap(student, o), cap(teacher, o)
    u, v = (
        z / (tau if x is None else x.unsqueeze(-1))
        for z, tau, x in ((student, o.tau_s, tau_s), (teacher, o.tau_t, tau_t))
    )
    want = torch.zeros(case.rows, STATS, dtype=torch.float64)
    want[:, 0] = student.amax(-1)
    if o.alpha < 1:
        want[:, 1] = teacher.amax(-1)
        for i, z in ((2, u), (3, v)):
            want[:, i] = (z - z.amax(-1, keepdim=True)).logsumexp(-1)
        plain = [x if x is None else x.double().cpu() for x in tensors[:4]]
        want[:, 5] = definition(*plain, options=o._replace(alpha=0.0, scale=2))
    if o.alpha > 0:
        want[:, 4] = (student - student.amax(-1, keepdim=True)).logsumexp(-1)
    if labels is not None:
        want[labels == o.ignore_index] = 0
    tolerance = 1e-12 if stats.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(stats.double().cpu()[:, :6], want[:, :6], rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- the edges, each a function of the kernels
def ignored_rows_may_hold_anything(forward, backward, device="cpu") -> None:
    for divergence in (0, 3, 4):
        options = _options(alpha=0.5, label_smoothing=0.1, divergence=divergence)
        tensors = make(Case("ignored", 4, 19, options, hard="labels", temperatures="rows"), device)
        tensors[4][1:3] = options.ignore_index
        for x in (tensors[0][1], tensors[1][2]):
            x.fill_(NAN)
        (loss, *grads), stats = run(forward, backward, tensors, options, torch.ones(4).to(device))
        for x in (loss, *grads, stats):
            assert (x[1:3] == 0).all()
            assert x[[0, 3]].isfinite().all()


def bad_rows_stay_alone(forward, backward, device="cpu") -> None:
    """A label out of range, a NaN logit, a row without any finite logit: NaN there, and nowhere else."""
    for divergence in (0, 3, 4):
        case = Case("bad", 6, 19, _options(alpha=0.5, divergence=divergence), hard="labels", temperatures="rows")
        tensors = make(case, device)
        tensors[4][0], tensors[4][1] = 19, -1
        tensors[0][2, 7] = tensors[1][3, 0] = NAN
        tensors[0][4].fill_(-INF)
        (loss, ds, *_), _ = run(forward, backward, tensors, case.options, torch.ones(6).to(device))
        assert loss.isnan().tolist() == [True] * 5 + [False]
        assert ds.isnan().any(-1).tolist() == [True] * 5 + [False]


def masks_at_the_label_and_around_it(forward, backward, device="cpu") -> None:
    """jsd and dkd where one network masks what the other has: finite wherever the definition is, and the same."""
    alone = [-INF, 0.3, -INF, -INF]
    student = torch.tensor([[1.0, 2.0, 0.5, -1.0], [1.0, -INF, 0.5, -INF], alone, [1.0, 2.0, 0.5, -1.0], alone])
    teacher = torch.tensor([[1.5, -INF, 0.0, 0.2], [0.4, -INF, 1.5, -INF], alone, alone, [1.0, 2.0, 0.5, -1.0]])
    labels = torch.ones(5, dtype=torch.int64)
    for divergence in (3, 4):
        tensors = (student.to(device), teacher.to(device), None, None, labels.to(device), None, None)
        options = _options(divergence=divergence)
        ours, _ = run(forward, backward, tensors, options, torch.ones(5).to(device))
        plain = (student.double(), teacher.double(), None, None, labels, None, None, options)
        torch.testing.assert_close(ours[0].double().cpu(), definition(*plain), rtol=1e-6, atol=1e-6)
        finite = 5 if divergence == 3 else 4  # a row where the student leaves nothing beside the label is infinite
        for x, y in zip(ours[1:3], kd_kl_gradient(*plain)[:2], strict=True):
            torch.testing.assert_close(x.double().cpu()[:finite], y[:finite], rtol=1e-6, atol=1e-6)


def hard_labels_alone_do_not_see_the_teacher(forward, backward, device="cpu") -> None:
    case = Case("hard only", 3, 19, _options(alpha=1.0), hard="labels")
    tensors = make(case, device)
    clean, _ = run(forward, backward, tensors, case.options, torch.ones(3).to(device))
    tensors[1].fill_(NAN)
    loss, ds, dt = run(forward, backward, tensors, case.options, torch.ones(3).to(device))[0][:3]
    torch.testing.assert_close(loss, clean[0], rtol=0, atol=0)
    torch.testing.assert_close(ds, clean[1], rtol=0, atol=0)
    assert (dt == 0).all()


def masked_where_it_matters_is_infinite(forward, backward, device="cpu") -> None:
    """A masked label, and a class the student alone masks: inf. Masked by the teacher alone: finite."""
    student = torch.tensor([[1.0, -INF, 0.5], [1.0, -INF, 0.5], [1.0, 2.0, 0.5]])
    teacher = torch.tensor([[1.0, 2.0, 0.5], [1.0, -INF, 0.5], [1.0, -INF, 0.5]])
    labels = torch.tensor([0, 1, 1])
    tensors = (student.to(device), teacher.to(device), None, None, labels.to(device), None, None)
    for alpha, want in ((0.0, [INF, 0.0, 0.0]), (1.0, [0.0, INF, 0.0]), (0.5, [INF, INF, 0.0])):
        loss, _ = forward(*tensors, *_options(1.0, 1.0, alpha=alpha), False)
        assert [x == INF for x in loss.tolist()] == [x == INF for x in want]
        assert not loss.isnan().any()
    smoothed, _ = forward(*tensors, *_options(alpha=1.0, label_smoothing=1.0), False)
    assert smoothed.isfinite().all()


def equal_distributions_are_zero_apart(forward, backward, device="cpu") -> None:
    """Sums of differences, not differences of sums: what multiply-adds leave is a rounding of one class."""
    logits = make(Case("equal", 4, 300), device)[0]
    labels = torch.arange(4, device=device)
    for divergence in (0, 1, 3, 4):
        tensors = (logits, logits.clone(), None, None, labels, None, None)
        (loss, ds, dt, *_), _ = run(
            forward, backward, tensors, _options(2.0, 2.0, divergence=divergence), torch.ones(4).to(device)
        )
        for x in (loss, ds, dt):
            assert x.abs().max() < 4e-7


def a_constant_added_to_a_row_changes_nothing(forward, backward, device="cpu") -> None:
    """Logits far from zero keep their digits: multiples of 1/256 near 2^13 are exact in fp32."""
    case = Case("shifted", 3, 100, _options(alpha=0.5), hard="labels", temperatures="rows")
    tensors = make(case, device)
    tensors = ((tensors[0] * 256).round() / 256, (tensors[1] * 256).round() / 256, *tensors[2:])
    grad = torch.ones(3).to(device)
    here, _ = run(forward, backward, tensors, case.options, grad)
    there, _ = run(forward, backward, (tensors[0] + 8192, tensors[1] - 8192, *tensors[2:]), case.options, grad)
    for x, y in zip(here, there, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def extreme_logits_stay_finite(forward, backward, device="cpu") -> None:
    for scale in (1e4, 1e30):
        tensors = tuple(x * scale for x in make(Case("extreme", 4, 70), device)[:2])
        ours, _ = run(forward, backward, (*tensors, *(None,) * 5), _options(1.0, 1.0), torch.ones(4).to(device))
        for x in ours[:3]:
            assert x.isfinite().all()
        assert (ours[0] >= 0).all()


def nothing_to_do(forward, backward, device="cpu") -> None:
    empty = torch.empty(0, 5, device=device)
    tensors = (empty, empty, *(None,) * 5)
    loss, stats = forward(*tensors, *Options(), False)
    ds, dt = backward(loss, *tensors, stats, *Options(), True, True)
    assert loss.shape == (0,)
    assert stats.shape == (0, STATS)
    assert ds.shape == dt.shape == (0, 5)


def only_what_is_asked_for(forward, backward, device="cpu") -> None:
    case = Case("needs", 3, 21, _options(alpha=0.5, **REVERSE), hard="labels")
    tensors = make(case, device)
    grad = torch.ones(3).to(device)
    both, stats = run(forward, backward, tensors, case.options, grad)
    for i, wants in enumerate(((True, False), (False, True))):
        some = backward(grad, *tensors, stats, *case.options, *wants)
        torch.testing.assert_close(some[i], both[1 + i], rtol=0, atol=0)
        assert some[1 - i].numel() == 0


def columns_may_be_expanded(forward, backward, device="cpu") -> None:
    """Weights and row gradients of stride 0, as summing a loss produces."""
    case = Case("expanded", 5, 21, _options(alpha=0.5), hard="labels")
    tensors = list(make(case, device))
    two, grad = torch.tensor([2.0]).to(device), torch.tensor([0.5]).to(device).expand(5)
    tensors[6] = two.expand(5)
    ours, _ = run(forward, backward, tuple(tensors), case.options, grad)
    tensors[6] = tensors[6].contiguous()
    plain, _ = run(forward, backward, tuple(tensors), case.options, grad.contiguous())
    for x, y in zip(ours[:3], plain[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def views_may_start_anywhere(forward, backward, device="cpu") -> None:
    """Inputs that start at no 16-byte boundary give what aligned copies give, up to the order of the sums."""
    for dtype, classes in ((torch.float32, 12), (torch.bfloat16, 2056)):
        case = Case("unaligned", 4, classes, _options(alpha=0.5, label_smoothing=0.1), dtype, "target")
        tensors = make(case, device)
        moved = list(tensors)
        for i in (0, 1, 5):
            x = tensors[i]
            moved[i] = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
        grad = torch.ones(4).to(device)
        ours, want = (run(forward, backward, t, case.options, grad)[0][:3] for t in (tuple(moved), tensors))
        for x, y in zip(ours, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5 if x.dtype == torch.float32 else 1e-2, atol=1e-6)


EDGES = [
    ignored_rows_may_hold_anything, bad_rows_stay_alone, hard_labels_alone_do_not_see_the_teacher,
    masked_where_it_matters_is_infinite, masks_at_the_label_and_around_it, equal_distributions_are_zero_apart,
    a_constant_added_to_a_row_changes_nothing, extreme_logits_stay_finite, nothing_to_do, only_what_is_asked_for,
    columns_may_be_expanded, views_may_start_anywhere,
]  # fmt: skip

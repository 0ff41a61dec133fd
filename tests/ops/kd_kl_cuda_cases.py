"""Cases of kd_kl that its CUDA kernels alone are tested on beside CASES: what they share rows by, and every divergence
with every way a row can be held. And the comparison for kernels that make loss and gradient at once."""

import torch

from kdfast.reference.kd_kl import Options, accumulate_dtype
from tests.ops.kd_kl_cases import INF, Case, autograd, compare, make, run

JSD, DKD = {"divergence": 3}, {"divergence": 4}
CAPPED = {"softcap": 12.0, "logit_scale": 1.5}
BF16, FP64 = torch.bfloat16, torch.float64

OTHERS = [
    # The two other divergences: alone, with temperatures, hard labels, masks, ignored rows, each storage type.
    Case("jsd", 3, 37, Options(4.0, 2.0, **JSD)),
    Case("jsd_teachers", 5, 20, Options(4.0, 2.0, beta=0.1, **JSD), temperatures="rows", weight=True),
    Case("jsd_students", 5, 20, Options(4.0, 2.0, beta=0.9, scale=1, **JSD), temperatures="one", masked=True),
    Case("jsd_labels", 4, 50, Options(1.0, 2.0, 0.4, beta=0.3, **JSD), hard="labels", temperatures="one"),
    Case("jsd_smoothed", 4, 50, Options(1.0, 2.0, 0.4, 0.1, **JSD), hard="ignored", masked=True),
    Case("jsd_target", 4, 50, Options(1.0, 2.0, 0.4, 0.1, scale=2, **JSD), hard="target", temperatures="rows"),
    Case("jsd_only_labels", 4, 50, Options(1.0, 2.0, 1.0, **JSD), hard="labels"),
    Case("jsd_bf16", 3, 45, Options(2.0, 2.0, 0.4, **JSD), BF16, "labels", temperatures="one"),
    Case("jsd_fp64", 3, 31, Options(2.0, 3.0, 0.4, beta=0.2, **JSD), FP64, "labels", temperatures="rows"),
    Case("jsd_one_class", 3, 1, Options(2.0, 3.0, **JSD), temperatures="rows"),
    Case("dkd", 3, 37, Options(4.0, 4.0, beta=8.0, **DKD), hard="labels"),
    Case("dkd_rows", 5, 20, Options(4.0, 2.0, beta=2.0, **DKD), hard="labels", temperatures="rows", weight=True),
    Case("dkd_one", 5, 20, Options(beta=0.5, target_weight=3.0, scale=1, **DKD), hard="ignored", temperatures="one"),
    Case("dkd_labels", 4, 50, Options(1.0, 2.0, 0.4, beta=0.3, **DKD), hard="labels", temperatures="one"),
    Case("dkd_smoothed", 4, 50, Options(1.0, 2.0, 0.4, 0.1, beta=8.0, **DKD), hard="ignored", masked=True),
    Case("dkd_only_labels", 4, 50, Options(1.0, 2.0, 1.0, **DKD), hard="labels"),
    Case("dkd_bf16", 3, 45, Options(2.0, 2.0, 0.4, beta=8.0, **DKD), BF16, "labels", temperatures="one"),
    Case("dkd_fp64", 3, 31, Options(2.0, 3.0, 0.4, beta=2.0, **DKD), FP64, "labels", temperatures="rows"),
    Case("dkd_two_classes", 4, 2, Options(2.0, 3.0, **DKD), hard="labels", temperatures="rows"),
    Case("dkd_one_class", 3, 1, Options(2.0, 3.0, 0.3, **DKD), hard="labels", temperatures="rows"),
    # Capped and scaled logits.
    Case("capped", 4, 37, Options(2.0, 3.0, 0.4, **CAPPED), hard="labels", temperatures="rows", masked=True),
    Case("capped_reverse", 4, 37, Options(2.0, 3.0, 0.4, 0.1, divergence=1, **CAPPED), BF16, "labels"),
    Case("capped_target", 4, 37, Options(2.0, 3.0, 0.4, 0.1, divergence=2, softcap=3.0), hard="target"),
    Case("scaled", 4, 37, Options(2.0, 3.0, 0.4, logit_scale=0.25), hard="ignored", temperatures="one", masked=True),
    Case("capped_fp64", 4, 31, Options(2.0, 3.0, 0.4, **CAPPED), FP64, "labels", temperatures="one"),
    Case("capped_jsd", 4, 50, Options(1.0, 2.0, 0.4, **JSD, **CAPPED), hard="labels", temperatures="one", masked=True),
    Case("capped_dkd", 4, 50, Options(1.0, 2.0, 0.4, **DKD, **CAPPED), hard="labels", temperatures="rows", masked=True),
    # A block a row.
    Case("block_jsd", 2, 3001, Options(2.0, 2.0, 0.3, **JSD), hard="labels", temperatures="rows"),
    Case("block_dkd", 2, 3001, Options(2.0, 2.0, 0.3, beta=2.0, **DKD), BF16, "labels", temperatures="one"),
    Case("block_capped", 2, 3001, Options(2.0, 2.0, 0.3, 0.1, **CAPPED), hard="target", temperatures="one"),
]

# Rows so few and long that several blocks share each.
SPLIT = [
    Case("split", 3, 20001, Options(2.0, 2.0, 0.5), hard="ignored", temperatures="rows", weight=True, masked=True),
    Case("split_plain", 2, 16384, Options(2.0, 4.0)),
    Case("split_hard", 2, 16385, Options(2.0, 4.0, 1.0, 0.1), hard="labels"),
    Case("split_reverse", 1, 40003, Options(2.0, 3.0, 0.3, 0.1, divergence=1), BF16, "target", temperatures="one"),
    Case("split_jsd", 2, 17003, Options(2.0, 3.0, 0.3, beta=0.3, **JSD), hard="labels", temperatures="rows"),
    Case("split_jsd_alone", 2, 17003, Options(2.0, 3.0, **JSD)),
    Case("split_dkd", 2, 33001, Options(2.0, 3.0, beta=2.0, **DKD), BF16, "labels", temperatures="one"),
    Case("split_capped", 2, 17003, Options(2.0, 3.0, 0.3, 0.1, **CAPPED), hard="labels", temperatures="one"),
    Case("split_fp64", 2, 9001, Options(2.0, 3.0, 0.3, 0.1), FP64, "labels", temperatures="rows"),
]


def compare_all(case: Case, ours: list, tensors: tuple, grad: torch.Tensor) -> None:
    """`ours`: [loss, ds, dt, dtau_s, dtau_t], None what is not looked at; the bound is `compare`'s."""
    truth = autograd(tensors, case.options, grad, torch.float64)
    eager = autograd(tensors, case.options, grad)
    slack = 2.0 if case.options.divergence >= 3 else 1.0  # more terms than a KL's, each with its own rounding
    for name, x, t, e in zip(("loss", "ds", "dt", "dtau_s", "dtau_t"), ours, truth, eager, strict=True):
        if x is None or t is None:
            continue
        i = ("dtau_s", "dtau_t").index(name) if "tau" in name else None
        m = t.abs().max()
        if i is not None:  # a sum that all but cancels, of dD/du * u
            z = tensors[i].double().masked_fill(tensors[i] == -INF, 0)
            m = ((truth[1 + i] * z).abs().sum(-1) / tensors[2 + i].double()).sum()
            m = m + (truth[0] / tensors[2 + i].double()).abs().sum()
        assert x.shape == e.shape, name
        assert x.dtype == e.dtype, name
        compare(name, x, t, e, slack * m.item(), False)


def check_others(case: Case, forward, backward, device="cpu") -> None:
    tensors = make(case, device)
    grad = torch.linspace(-1.5, 2.0, case.rows, dtype=accumulate_dtype(case.dtype)).to(device)
    compare_all(case, run(forward, backward, tensors, case.options, grad)[0], tensors, grad)


def check_value_and_grad(case: Case, value_and_grad, forward, device="cpu", coefficient: float = 0.375) -> None:
    """The sum, its student gradient, and the statistics the two-launch forward would have made."""
    tensors = make(case, device)
    temperature_grad = tensors[2] is not None
    loss, stats, ds = value_and_grad(*tensors, *case.options, temperature_grad, coefficient)
    rows, want = forward(*tensors, *case.options, temperature_grad)
    accumulate = accumulate_dtype(case.dtype)
    assert loss.shape == ()
    assert loss.dtype == stats.dtype == accumulate
    tolerance = 1e-12 if accumulate == torch.float64 else 2e-5
    torch.testing.assert_close(stats, want, rtol=tolerance, atol=tolerance * max(1.0, want.abs().max().item()))
    torch.testing.assert_close(loss.double(), coefficient * rows.double().sum(), rtol=tolerance, atol=tolerance)
    grad = torch.full((case.rows,), coefficient, dtype=accumulate, device=device)
    compare_all(case, [None, ds, None, None, None], tensors, grad)


# ---------------------------------------------------------------- edges, functions of the kernels as in kd_kl_cases
def dkd_keeps_the_others_beside_a_sure_label(forward, backward, device="cpu") -> None:
    """1 - p_t is 0 in fp32, and the other classes' part is none the less exact; so are its gradients."""
    case = Case("sure", 3, 21, Options(1.0, 1.0, beta=8.0, **DKD), hard="labels")
    tensors = make(case, device)
    rows = torch.arange(3, device=device)
    for x in tensors[:2]:
        x[rows, tensors[4]] = 200.0
    grad = torch.ones(3, device=device)
    truth = autograd(tensors, case.options, grad, torch.float64)
    ours, _ = run(forward, backward, tensors, case.options, grad)
    assert truth[0].min() > 1
    for x, y in zip(ours[:3], truth[:3], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=2e-6, atol=4e-5)  # 8 (beta) 16 (log q^) 2^-23, and twice that


def dkd_may_mask_the_label(forward, backward, device="cpu") -> None:
    """Masked in both: the others are all there is. In the student alone: infinite, and not NaN."""
    case = Case("masked label", 2, 21, Options(1.0, 1.0, beta=2.0, **DKD), hard="labels")
    tensors = make(case, device)
    tensors[0][0, tensors[4][0]] = tensors[1][0, tensors[4][0]] = -INF
    tensors[0][1, tensors[4][1]] = -INF
    (loss, ds, dt, *_), _ = run(forward, backward, tensors, case.options, torch.ones(2, device=device))
    truth = autograd(tensors, case.options, torch.ones(2, device=device), torch.float64)
    for x, y in zip((loss, ds, dt), truth[:3], strict=True):
        torch.testing.assert_close(x[0].double(), y[0], rtol=1e-5, atol=1e-5)
    assert loss[1] == INF


def jsd_of_equal_distributions_is_zero(forward, backward, device="cpu") -> None:
    logits = make(Case("equal", 4, 300), device)[0]
    for beta in (0.2, 0.7):
        tensors = (logits, logits.clone(), *(None,) * 5)
        options = Options(2.0, 2.0, beta=beta, **JSD)
        for x in run(forward, backward, tensors, options, torch.ones(4, device=device))[0][:3]:
            assert x.abs().max() < 4e-7  # a ratio is rounded once, its logarithm once


def disjoint_distributions_have_the_largest_jsd(forward, backward, device="cpu") -> None:
    """Where one is 0 the mixture is a multiple of the other: the entropy of the shares, and no NaN."""
    student = torch.tensor([[0.0, 1.0, -INF, -INF], [0.0, 0.0, -300.0, -300.0]], device=device)
    tensors = (student, student.flip(1).contiguous(), *(None,) * 5)
    beta = torch.tensor(0.3, dtype=torch.float64)
    (loss, ds, dt, *_), _ = run(
        forward, backward, tensors, Options(1.0, 1.0, beta=0.3, **JSD), torch.ones(2, device=device)
    )
    want = -(beta * beta.log() + (1 - beta) * (1 - beta).log())
    torch.testing.assert_close(loss.double().cpu(), want.expand(2), rtol=1e-6, atol=0)
    assert ds.abs().max() < 1e-6
    assert dt.abs().max() < 1e-6


def bad_rows_of_other_divergences_stay_alone(forward, backward, device="cpu") -> None:
    """A label out of range and a NaN logit are NaN in their rows; an ignored row may hold anything."""
    for options in (Options(2.0, 3.0, 0.3, **JSD), Options(2.0, 3.0, 0.3, **DKD, **CAPPED)):
        case = Case("bad", 6, 19, options, hard="labels", temperatures="rows")
        tensors = make(case, device)
        tensors[4][0], tensors[4][1], tensors[4][4] = 19, -1, options.ignore_index
        tensors[0][2, 7] = tensors[1][3, 0] = tensors[0][4, 3] = float("nan")
        (loss, ds, *_), stats = run(forward, backward, tensors, options, torch.ones(6, device=device))
        assert loss.isnan().tolist() == [True] * 4 + [False] * 2
        assert ds.isnan().any(-1).tolist() == [True] * 4 + [False] * 2
        assert loss[4] == 0
        assert (ds[4] == 0).all()
        assert (stats[4] == 0).all()


def masked_stays_masked_under_a_cap(forward, backward, device="cpu") -> None:
    case = Case("capped", 3, 19, Options(2.0, 3.0, 0.3, **CAPPED), hard="labels", masked=True)
    tensors = make(case, device)
    (loss, ds, dt, *_), _ = run(forward, backward, tensors, case.options, torch.ones(3, device=device))
    assert loss.isfinite().all()
    assert (ds[tensors[0] == -INF] == 0).all()
    assert (dt[tensors[1] == -INF] == 0).all()


OTHER_EDGES = [
    dkd_keeps_the_others_beside_a_sure_label,
    dkd_may_mask_the_label,
    jsd_of_equal_distributions_is_zero,
    disjoint_distributions_have_the_largest_jsd,
    bad_rows_of_other_divergences_stay_alone,
    masked_stays_masked_under_a_cap,
]

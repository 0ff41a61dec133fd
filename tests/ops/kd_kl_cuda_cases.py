"""Cases of kd_kl that its CUDA kernels alone are tested on beside CASES: what they share rows by, and every divergence
with every way a row can be held. And the comparison for kernels that make loss and gradient at once."""

import torch

from kdfast.reference.kd_kl import Options, accumulate_dtype
from tests.ops.kd_kl_cases import INF, Case, autograd, compare, make, run

JSD, DKD = {"divergence": 3}, {"divergence": 4}
CAPPED = {"softcap": 12.0, "logit_scale": 1.5}
BF16, FP64 = torch.bfloat16, torch.float64

# fmt: skip
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

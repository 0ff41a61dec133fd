"""csrc/math on a CPU: the formulas the CUDA kernels are made of, compiled by the C++ compiler alone."""

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from kdfast.reference.kd_kl import Options
from kdfast.reference.kd_kl import kd_kl as definition

ROOT = Path(__file__).resolve().parents[2]
INF = float("inf")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    binary = tmp_path_factory.mktemp("math") / "math_headers"
    source = ROOT / "tests" / "ops" / "math_headers.cpp"
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-I",
        str(ROOT),
        str(source),
        "-o",
        str(binary),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(binary)


def _rows() -> list[tuple]:
    """(student, teacher, target): plain; masked from the first chunk on; rising, so that every chunk raises
    the maximum; one class."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for classes in (23, 23, 17, 1):
        student, teacher, target = torch.randn(3, classes, generator=generator, dtype=torch.float64) * 4
        rows.append([student, teacher, target.softmax(0)])
    masked = rows[1]
    masked[0][:6] = masked[1][:7] = -INF
    masked[0][9] = masked[1][9] = masked[1][12] = -INF
    masked[2][:6] = masked[2][9] = 0
    rows[2][0], rows[2][1] = rows[2][0].sort().values * 3, rows[2][1].sort().values * 3
    return rows


SHARES = [(0.0, 0.0, 0), (0.5, 0.0, 1), (0.3, 0.2, 2)]  # alpha, label_smoothing, scale
CALLS = [
    *(Options(4.0, 2.0, *share[:2], -100, d, share[2]) for d, share in itertools.product(range(3), SHARES)),
    *(Options(4.0, 2.0, *share[:2], -100, 3, share[2], beta) for beta, share in itertools.product((0.2, 0.8), SHARES)),
    # The hard part here takes probabilities and dkd a label, so dkd stands alone.
    Options(4.0, 2.0, 0.0, 0.0, -100, 4, 0, 8.0, 1.0),
    Options(1.0, 2.0, 0.0, 0.0, -100, 4, 1, 0.5, 3.0),
    *(Options(4.0, 2.0, 0.3, 0.2, -100, d, 0, softcap=6.0, logit_scale=1.5) for d in range(4)),
    Options(4.0, 2.0, 0.0, 0.0, -100, 4, 0, 8.0, 1.0, softcap=6.0),
    Options(4.0, 2.0, 0.5, logit_scale=0.5),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_rows(program, dtype, tolerance):
    cases = [(o, [x.to(dtype).double() for x in row]) for o in CALLS for row in _rows()]
    lines = []
    for o, row in cases:
        if o.divergence == 1:  # where the student weighs, more may be masked in the student
            row[0], row[1] = row[1], row[0]
            row[2] = row[2].masked_fill(row[0] == -INF, 0)
        integers = [int(dtype == torch.float64), row[0].numel(), o.divergence, o.scale, row[0].numel() // 2]
        numbers = [o.tau_s, o.tau_t, o.alpha, o.label_smoothing, o.beta, o.target_weight, o.softcap, o.logit_scale]
        lines.append(" ".join(map(repr, [*integers, *numbers, *torch.cat(row).tolist()])))
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    printed = [torch.tensor([float(x) for x in line.split()], dtype=torch.float64) for line in done.stdout.splitlines()]
    for (o, row), ours in zip(cases, printed, strict=True):
        leaves = [x.unsqueeze(0).requires_grad_() for x in row[:2]]
        taus = [torch.tensor([tau], dtype=torch.float64, requires_grad=True) for tau in (o.tau_s, o.tau_t)]
        labels = torch.tensor([row[0].numel() // 2]) if o.divergence == 4 else None
        target = None if o.divergence == 4 else row[2].unsqueeze(0)
        loss = definition(*leaves, *taus, labels, target, None, o)
        gradients = torch.autograd.grad(loss, [*taus, *leaves], allow_unused=True)
        truth = torch.cat([x.flatten() for x in (loss.detach(), *gradients)])
        assert truth.isfinite().all()
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance * max(1.0, loss.item()))

"""docs/swaps.md: each line equals what it stands in for, written out in plain PyTorch."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kdfast
from tests.losses.test_kd_kl_drop_in import decoupled, mixture

PAGE = Path(__file__).resolve().parents[2] / "docs" / "swaps.md"
HERE = re.findall(r"^\| .* \| `([^`]*)` \|$", PAGE.read_text(), flags=re.MULTILINE)
T, A, R = 3.0, 0.3, 0.8


def kl(s, t, dim=1):  # [batch, ...]
    return F.kl_div(F.log_softmax(s / T, dim), F.softmax(t / T, dim), reduction="none").sum(dim)


def hcl(student, teacher):
    total, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
    for size in (4, 2, 1):
        if size < student.shape[2]:
            weight /= 2
            a, b = (F.adaptive_avg_pool2d(x, (size, size)) for x in (student, teacher))
            total, weights = total + weight * F.mse_loss(a, b), weights + weight
    return total / weights


def attention(x):
    return F.normalize(x.square().mean(1).flatten(1))


def masked(m_s, m_t, m):
    counted = m != 255
    soft = (kl(m_s, m_t) * counted).sum() / counted.sum()
    return A * F.cross_entropy(m_s, m, ignore_index=255) + (1 - A) * T * T * soft


THERE = [  # in the order of the page
    lambda d: T * T * kl(d["y_s"], d["y_t"]).mean(),
    lambda d: A * F.cross_entropy(d["y_s"], d["y"]) + (1 - A) * T * T * kl(d["y_s"], d["y_t"]).mean(),
    lambda d: R * F.cross_entropy(d["y_s"], d["y"]) + A * T * T * kl(d["y_s"], d["y_t"]).mean(),
    lambda d: kl(d["y_s"], d["y_t"]).mean(),
    lambda d: T * T * kl(d["y_s"], d["y_t"]).sum() / d["y_s"].numel(),
    lambda d: -(F.softmax(d["y_t"] / T, 1) * F.log_softmax(d["y_s"] / T, 1)).sum(1).mean(),
    lambda d: decoupled(d["y_s"], d["y_t"], d["y"], 1.0, 8.0, T),
    lambda d: mixture(d["y_s"], d["y_t"], d["y"], 0.9, 1.0, "batchmean"),
    lambda d: masked(d["m_s"], d["m_t"], d["m"]),
    lambda d: A * F.cross_entropy(d["y_s"], d["p"]) + (1 - A) * T * T * kl(d["y_s"], d["y_t"]).mean(),
    lambda d: sum(map(hcl, d["f_s"], d["f_t"])),
    lambda d: F.mse_loss(d["f_s"][0], d["f_t"][0]),
    lambda d: sum((attention(a) - attention(b)).square().mean() for a, b in zip(d["f_s"], d["f_t"], strict=True)),
]


def drawn(dtype):
    torch.manual_seed(0)

    def pair(*shape):
        return [(2 * torch.randn(shape)).to(dtype) for _ in range(2)]

    maps = list(zip(*(pair(3, *shape) for shape in ((4, 8, 8), (6, 4, 4), (5, 1, 1))), strict=True))
    m = torch.randint(5, (2, 4, 3))
    m[0, :2] = 255
    (y_s, y_t), (m_s, m_t) = pair(8, 11), pair(2, 5, 4, 3)
    p = torch.softmax(torch.randn(8, 11), 1).to(dtype)
    return {"y_s": y_s, "y_t": y_t, "y": torch.randint(11, (8,)), "p": p, "m_s": m_s, "m_t": m_t, "m": m,
            "f_s": list(maps[0]), "f_t": list(maps[1])}  # fmt: skip


def with_leaves(data, dtype):
    """The data in another type, and what has a gradient."""
    data = {
        name: [x.to(dtype) for x in value] if isinstance(value, list) else value if value.dtype == torch.int64
        else value.to(dtype)
        for name, value in data.items()
    }  # fmt: skip
    leaves = [data["y_s"], data["m_s"], *data["f_s"]]
    for leaf in leaves:
        leaf.requires_grad_()
    return data, leaves


def test_every_line_has_its_definition():
    assert len(HERE) == len(THERE)


# bf16: what comes in is exact, losses are fp32; gradients are rounded to bf16, 2^-9
@pytest.mark.parametrize(
    ("dtype", "value", "gradient"),
    [(torch.float64, 1e-12, 1e-11), (torch.float32, 2e-6, 1e-5), (torch.bfloat16, 2e-6, 4e-3)],
    ids=str,
)
@pytest.mark.parametrize("line", range(len(HERE)), ids=lambda line: HERE[line][:40])
def test_line_equals_its_definition(line, dtype, value, gradient):
    data = drawn(dtype)
    ours, leaves = with_leaves(data, dtype)
    names = {name: getattr(kdfast, name) for name in kdfast.__all__} | ours | {"T": T, "a": A, "r": R}
    loss = eval(HERE[line], names)
    theirs, their_leaves = with_leaves(data, torch.float64)
    expected = THERE[line](theirs)
    torch.testing.assert_close(loss.double(), expected, rtol=value, atol=0)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    wanted = torch.autograd.grad(expected, their_leaves, allow_unused=True)
    for mine, other in zip(gradients, wanted, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            scale = other.abs().max()
            torch.testing.assert_close(mine.double(), other, rtol=gradient, atol=float(gradient * scale))

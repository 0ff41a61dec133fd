"""What JSD, decoupled KD and the softcap are by themselves; the laws they share stand in test_kd_kl.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from kdfast import kd_loss
from kdfast._native import has_kernel
from kdfast.reference.kd_kl import Options, kd_kl, kd_kl_gradient, kd_kl_hvp
from tests.laws import close

INF = math.inf
LOG_2 = math.log(2)
PLAIN = {"student_temperature": 1.0, "scale": "none", "reduction": "none"}


def draw(rows=5, classes=9, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), teacher.to(dtype), torch.randint(classes, (rows,), generator=generator)


def jsd(student, teacher, **options):
    return kd_loss(student, teacher, divergence="jsd", **PLAIN | options)


def dkd(student, teacher, labels, **options):
    return kd_loss(student, teacher, labels, alpha=0.0, divergence="dkd", **PLAIN | options)


# ---------------------------------------------------------------- the definition
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("divergence", range(5))
def test_closed_forms_are_what_autograd_derives(divergence, softcap, masked):
    """Gradient and Hessian product of the definition in all four inputs; with classes masked in both networks, and
    where the divergence stays finite in one."""
    student, teacher, labels = draw()
    if masked:
        labels = labels.clamp(min=4)
        student[:, 0] = teacher[:, 0] = -INF
        if divergence in (1, 3):
            student[1:, 1] = -INF
        if divergence != 1:
            teacher[:2, 2] = -INF
        if divergence == 4:  # no other class left to the teacher
            teacher[0] = teacher[0].masked_fill(torch.arange(9) != labels[0], -INF)
    generator = torch.Generator().manual_seed(1)
    taus = [1 + torch.rand(5, generator=generator, dtype=torch.float64) for _ in range(2)]
    weight = torch.rand(5, generator=generator, dtype=torch.float64)
    options = Options(1.0, 1.0, 0.3, 0.1, -100, divergence, 1, 0.3, 1.5, softcap, 0.5)
    inputs = (student, teacher, *taus)
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = kd_kl(*leaves, labels, None, weight, options).sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    for ours, truth in zip(kd_kl_gradient(*inputs, labels, None, weight, options), first, strict=True):
        close(ours, truth.detach())
    direction = tuple(torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in inputs)
    along = sum((g * w).sum() for g, w in zip(first, direction, strict=True))
    second = torch.autograd.grad(along, leaves)
    for ours, truth in zip(kd_kl_hvp(*inputs, labels, None, weight, options, direction=direction), second, strict=True):
        close(ours, truth)


# ---------------------------------------------------------------- JSD
def test_jsd_by_hand():
    """p = (1, 0), q = (1/2, 1/2), m = (3/4, 1/4): D = 1/2 log(4/3) + 1/2 (1/2 log(2/3) + 1/2 log 2)."""
    teacher = torch.tensor([[0.0, -INF]], dtype=torch.float64)
    want = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * LOG_2
    close(jsd(torch.zeros_like(teacher), teacher), torch.tensor([want], dtype=torch.float64))


def test_jsd_swaps_with_its_share():
    student, teacher, _ = draw()
    close(jsd(student, teacher, beta=0.3), jsd(teacher, student, beta=0.7))
    assert (jsd(student, teacher) > 0).all()
    close(jsd(student, student), torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_jsd_of_distributions_with_nothing_in_common(dtype):
    """Each masks what the other has: the largest value, the entropy of (beta, 1 - beta), and no gradient."""
    student, teacher, _ = draw(dtype=dtype)
    student[:, :4], teacher[:, 4:] = -INF, -INF
    student.requires_grad_(), teacher.requires_grad_()
    loss = jsd(student, teacher, beta=0.2)
    want = -0.2 * math.log(0.2) - 0.8 * math.log(0.8)
    torch.testing.assert_close(loss, torch.full_like(loss, want), rtol=1e-6, atol=0)
    for g in torch.autograd.grad(loss.sum(), (student, teacher)):
        torch.testing.assert_close(g, torch.zeros_like(g), rtol=0, atol=1e-6)


def test_jsd_keeps_the_digits_of_close_distributions():
    """Differences of 1e-3 in fp32: the divergence is a millionth, and right to three digits, which no sum of
    logarithms rounded on their own could be."""
    if not has_kernel("kd_kl", "CPU"):
        pytest.skip("the definition sums logarithms rounded on their own")
    student, teacher, _ = draw(64, 100, torch.float32)
    teacher = student + 1e-3 * teacher
    exact = jsd(student.double(), teacher.double())
    assert exact.max() < 1e-5
    assert ((jsd(student, teacher) - exact) / exact).abs().max() < 1e-3


# ---------------------------------------------------------------- decoupled KD
def test_dkd_divides_the_kl():
    """KL(p || q) = TCKD + (1 - p_t) NCKD, the paper's equation 5."""
    student, teacher, labels = draw()
    target = dkd(student, teacher, labels, target_weight=1.0, beta=0.0)
    others = dkd(student, teacher, labels, target_weight=0.0, beta=1.0)
    p_t = teacher.softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    close(target + (1 - p_t) * others, kd_loss(student, teacher, **PLAIN))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dkd_where_the_rest_underflows(dtype):
    """Both networks certain by e^200: 1 - p_t is nothing in fp32, and p^ is as well known as ever."""
    student, teacher, labels = draw(dtype=dtype)
    at_label = F.one_hot(labels, 9).bool()
    others = [z.double()[~at_label].reshape(5, 8).log_softmax(-1) for z in (teacher, student)]
    want = 8 * F.kl_div(others[1], others[0], reduction="none", log_target=True).sum(-1)
    student, teacher = (z.masked_fill(at_label, 200.0).requires_grad_() for z in (student, teacher))
    loss = dkd(student, teacher, labels)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    gradient = torch.autograd.grad(loss.sum(), student)[0]
    by_others = 8 * (others[1].exp() - others[0].exp())
    torch.testing.assert_close(
        gradient[~at_label].reshape(5, 8).double(), by_others, rtol=torch.finfo(dtype).eps, atol=1e-5
    )
    assert gradient[at_label].eq(0).all()


def rows_of(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_dkd_with_the_label_at_a_masked_class():
    """Masked by both: only the others count. By the teacher: -log(1 - q_t) beside them. By the student alone: inf."""
    labels = torch.tensor([1])
    free, masked = rows_of([1.0, 2.0, 0.5]), rows_of([1.0, -INF, 0.5])
    other, other_masked = rows_of([0.0, 0.3, 1.0]), rows_of([0.0, -INF, 1.0])
    rest = 8 * kd_loss(free[:, [0, 2]], other[:, [0, 2]], **PLAIN)
    close(dkd(masked, other_masked, labels), rest)
    close(dkd(free, other_masked, labels), rest - (1 - free.softmax(-1)[:, 1]).log())
    assert dkd(masked, other, labels) == INF
    student = free.clone().requires_grad_()
    gradient = torch.autograd.grad(dkd(student, other_masked, labels).sum(), student)[0]
    close(gradient[:, 1], student.detach().softmax(-1)[:, 1])  # d/du_t of -log(1 - q_t)


def test_dkd_without_other_classes():
    """To the teacher: NCKD is a sum over nothing and TCKD = -log q_t. To both, or with one class: 0. To the student
    alone: inf."""
    labels = torch.tensor([1])
    free, alone = rows_of([1.0, 2.0, 0.5]), rows_of([-INF, 0.3, -INF])
    close(dkd(free, alone, labels), -free.log_softmax(-1)[:, 1])
    close(dkd(alone, alone + 1, labels), torch.zeros(1, dtype=torch.float64), 0, 0)
    assert dkd(alone, free, labels) == INF
    student = free.clone().requires_grad_()
    gradient = torch.autograd.grad(dkd(student, alone, labels).sum(), student)[0]
    close(gradient, free.softmax(-1) - F.one_hot(labels, 3))
    one = torch.randn(4, 1, requires_grad=True)
    loss = dkd(one, torch.randn(4, 1), torch.zeros(4, dtype=torch.int64))
    assert loss.eq(0).all()
    assert torch.autograd.grad(loss.sum(), one)[0].eq(0).all()


@pytest.mark.parametrize("divergence", ["jsd", "dkd"])
def test_bad_rows_stay_alone(divergence):
    """An ignored row may hold anything and counts for nothing; a NaN logit makes its own row NaN."""
    student, teacher, labels = draw(4, dtype=torch.float32)
    labels[1] = -100
    student[1], teacher[1] = torch.nan, INF
    student[2, 3] = torch.nan
    student.requires_grad_(), teacher.requires_grad_()
    loss = kd_loss(student, teacher, labels, divergence=divergence, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False]
    assert loss[1] == 0
    for g in torch.autograd.grad(loss.sum(), (student, teacher)):
        assert g.isnan().any(-1).tolist() == [False, False, True, False]
        assert g[1].eq(0).all()


# ---------------------------------------------------------------- softcap
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_softcap_is_a_cap_before_everything(dtype):
    student, teacher, labels = draw(dtype=dtype)
    student[:, 0] = teacher[:, 0] = -INF
    labels = labels.clamp(min=1)

    def cap(z):
        return torch.where(z == -INF, z, 2.5 * torch.tanh(0.7 * z / 2.5))

    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    for divergence in ("forward_kl", "jsd", "dkd"):
        leaves = [z.clone().requires_grad_() for z in (student, teacher)]
        ours = kd_loss(*leaves, labels, divergence=divergence, softcap=2.5, logit_scale=0.7)
        by_hand = kd_loss(*map(cap, leaves), labels, divergence=divergence)
        torch.testing.assert_close(ours, by_hand, rtol=tolerance, atol=tolerance)
        for x, y in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(by_hand, leaves), strict=True):
            torch.testing.assert_close(x, y.nan_to_num(), rtol=tolerance, atol=tolerance)
            assert x[:, 0].eq(0).all()


def test_softcap_tames_any_logit():
    student, teacher = torch.tensor([[1e30, -1e30, 0.0]], requires_grad=True), torch.tensor([[-1e30, 0.0, 1e30]])
    loss = kd_loss(student, teacher, softcap=20.0, **PLAIN)
    want = kd_loss(torch.tensor([[20.0, -20.0, 0.0]]), torch.tensor([[-20.0, 0.0, 20.0]]), **PLAIN)
    close(loss.detach(), want, 1e-6, 0)
    assert torch.autograd.grad(loss.sum(), student)[0].tolist()[0][:2] == [0, 0]

"""The drop-ins equal what they stand in for: their public definitions, written out over whole matrices."""

import math

import pytest
import torch
import torch.nn.functional as F

import kdfast
from tests.laws import close

ROWS, CLASSES = 6, 11


def draw(*lead):
    generator = torch.Generator().manual_seed(5)
    student, teacher = (3 * torch.randn(*lead, CLASSES, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(CLASSES, lead, generator=generator)


def same(ours, theirs, student):
    close(ours.detach(), theirs.detach())
    close(torch.autograd.grad(ours, student)[0], torch.autograd.grad(theirs, student)[0])


def decoupled(student, teacher, target, alpha, beta, temperature):
    """As published: probabilities summed in two groups; the label hidden from the rest by a large constant."""
    one = F.one_hot(target, student.shape[1]).to(student.dtype)
    q, p = F.softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    q, p = (torch.stack([(x * one).sum(1), (x * (1 - one)).sum(1)], 1) for x in (q, p))
    tckd = F.kl_div(q.log(), p, reduction="sum")
    log_q, log_p = (F.log_softmax(x / temperature - 1000 * one, 1) for x in (student, teacher))
    nckd = F.kl_div(log_q, log_p.exp(), reduction="sum")
    return (alpha * tckd + beta * nckd) * temperature**2 / target.shape[0]


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.5, 2.0, 1.0), (0.0, 1.0, 3.0)])
def test_dkd_loss(alpha, beta, temperature):
    student, teacher, target = draw(ROWS)
    ours = kdfast.dkd_loss(student, teacher, target, alpha, beta, temperature)
    same(ours, decoupled(student, teacher, target, alpha, beta, temperature), student)


def mixture(student, teacher, labels, beta, temperature, reduction):
    """As published: a matrix of terms, positions picked by a mask, then reduced."""
    log_q, log_p = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)

    def kl(log_from, log_to):
        return F.kl_div(log_to, log_from, reduction="none", log_target=True)

    if beta in (0, 1):
        terms = kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_q + math.log(1 - beta), log_p + math.log(beta))
        terms = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    counted = None if labels is None else labels != -100
    terms = terms if counted is None else terms[counted]
    positions = student.shape[0] if counted is None else counted.sum()
    return {"batchmean": terms.sum() / positions, "sum": terms.sum(), "mean": terms.mean()}[reduction]


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_generalized_jsd_loss(beta, reduction, masked):
    student, teacher, labels = draw(3, 4)
    labels[:, 1] = -100
    labels = labels if masked else None
    ours = kdfast.generalized_jsd_loss(student, teacher, labels, beta, 1.5, reduction)
    same(ours, mixture(student, teacher, labels, beta, 1.5, reduction), student)


def test_no_position_counts():
    student, teacher, labels = draw(2, 3)
    loss = kdfast.generalized_jsd_loss(student, teacher, torch.full_like(labels, -100))
    assert loss == 0
    assert torch.autograd.grad(loss, student)[0].eq(0).all()


@pytest.mark.parametrize("count", [7, torch.tensor(7)], ids=["number", "tensor"])
def test_the_sum_is_divided_by_the_items_of_all_accumulated_batches(count):
    student, teacher, labels = draw(3, 4)
    labels[:, 1] = -100
    ours = kdfast.generalized_jsd_loss(student, teacher, labels, 0.5, 1.5, num_items_in_batch=count)
    same(ours, mixture(student, teacher, labels, 0.5, 1.5, "sum") / 7, student)
    with pytest.raises(ValueError, match="num_items_in_batch belongs to reduction='batchmean', got reduction='sum'"):
        kdfast.generalized_jsd_loss(student, teacher, labels, reduction="sum", num_items_in_batch=count)

"""kd_kl_topk by its cases and by the law suite, through the public topk_kd_loss, and what is its own."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from kdfast import kd_loss, topk_kd_loss, topk_teacher
from kdfast.reference.kd_kl_topk import kd_kl_topk as reference
from tests.laws import LawfulOp, Laws, close
from tests.ops.kd_kl_topk_cases import CASES, EDGES, check

FORWARD, BACKWARD = torch.ops.kdfast.kd_kl_topk.default, torch.ops.kdfast.kd_kl_topk_backward.default


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel(case):
    check(case, FORWARD, BACKWARD)


@pytest.mark.parametrize("edge", EDGES, ids=lambda f: f.__name__)
def test_edge(edge):
    edge(FORWARD, BACKWARD)


# ---------------------------------------------------------------- laws
def inputs(generator, shape, dtype, variant):
    *lead, classes = shape
    real = torch.float64 if dtype == torch.float64 else torch.float32
    student, teacher = (3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    k = min(variant.get("k", 3), classes)
    log_probs, indices = (teacher / 4).log_softmax(-1).topk(k, -1)
    kwargs = {name: x for name, x in variant.items() if name not in ("labels", "taus", "weight", "k")}
    kwargs |= {"log_probs": log_probs.to(real), "indices": indices}
    tensors = [student.to(dtype)]
    if variant.get("taus"):
        size = tuple(lead) if variant["taus"] == "row" else ()
        tensors.append(1 + 3 * torch.rand(size, generator=generator, dtype=torch.float64).to(real))
    if variant.get("weight"):
        kwargs["weight"] = torch.rand(lead, generator=generator, dtype=torch.float64).to(real)
    if variant.get("labels"):
        kwargs["labels"] = torch.randint(classes, lead, generator=generator)
        if variant["labels"] == "ignored":
            kwargs["labels"].view(-1)[::3] = -100
    return tuple(tensors), kwargs


def call(student, tau=4.0, *, log_probs, indices, **kwargs):
    return topk_kd_loss(student, log_probs, indices, student_temperature=tau, **kwargs)


def reduced(loss, labels, shape, reduction):
    if reduction == "none":
        return loss.reshape(shape[:-1])
    counted = loss.numel() if labels is None else int((labels != -100).sum())
    whole = shape[0] if len(shape) > 1 else 1
    return loss.sum() / max({"sum": 1, "mean": counted, "batchmean": whole}[reduction], 1)


def truth(student, tau=4.0, *, log_probs, indices, labels=None, weight=None, alpha=0.5, reduction="batchmean"):
    """The definition, and PyTorch's cross-entropy."""
    shape = student.shape
    rows = shape[:-1].numel()
    student, log_probs, indices = (x.reshape(rows, x.shape[-1]) for x in (student, log_probs, indices))
    tau = torch.as_tensor(tau, dtype=student.dtype).expand(shape[:-1]).reshape(rows)
    flat = None if labels is None else labels.reshape(rows)
    weight = None if weight is None else weight.reshape(rows)
    loss = reference(student, log_probs, indices, tau, flat, weight)
    if labels is not None:
        hard = F.cross_entropy(student, flat, reduction="none")
        loss = alpha * (hard if weight is None else weight * hard) + (1 - alpha) * loss
    return reduced(loss, labels, shape, reduction)


def eager(student, tau=4.0, *, log_probs, indices, labels=None, weight=None, alpha=0.5, reduction="batchmean"):
    """What one writes in PyTorch, in the logits' own dtype."""
    log_q = F.log_softmax(student / (tau.unsqueeze(-1) if isinstance(tau, torch.Tensor) else tau), -1)
    listed = log_q.gather(-1, indices)
    p = log_probs.exp()
    soft = (p * (log_probs - listed)).sum(-1)
    if indices.shape[-1] < student.shape[-1]:
        rest = torch.ones_like(log_q, dtype=torch.bool).scatter(-1, indices, False)
        p_tail = (1 - p.sum(-1)).clamp(min=1e-30 if p.dtype == torch.float64 else 1e-7)
        soft = soft + p_tail * (p_tail.log() - log_q.masked_fill(~rest, -torch.inf).logsumexp(-1))
    loss = tau**2 * soft
    if labels is not None:
        hard = F.cross_entropy(student.reshape(-1, student.shape[-1]), labels.reshape(-1), reduction="none")
        loss = torch.where(labels == -100, 0, alpha * hard.reshape(labels.shape) + (1 - alpha) * loss)
    loss = loss if weight is None else weight * loss
    return reduced(loss, labels, student.shape, reduction)


def raw():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 9, generator=generator)
    log_probs, indices = topk_teacher(torch.randn(4, 9, generator=generator), 3, 2.0)
    labels, weight = torch.tensor([0, 3, -100, 8]), torch.rand(4, generator=generator)
    learned = (
        student.clone().requires_grad_(),
        log_probs,
        indices,
        torch.tensor([2.0], requires_grad=True),
        labels,
        weight,
    )
    bare = (student, log_probs, indices, None, None, None)
    stats = FORWARD(*bare, 4.0, -100, False)[1]
    return [
        (FORWARD, (*bare, 4.0, -100, False)),
        (FORWARD, (*learned, 1.0, -100, True)),
        (BACKWARD, (torch.ones(4), *bare, stats, 4.0, -100)),
    ]


variant_strategy = st.fixed_dictionaries(
    {
        "k": st.integers(1, 12),
        "labels": st.sampled_from([None, "index", "ignored"]),
        "alpha": st.sampled_from([0.0, 0.25, 1.0]),
        "taus": st.sampled_from([None, "one", "row"]),
        "weight": st.booleans(),
        "reduction": st.sampled_from(["none", "sum", "mean", "batchmean"]),
    }
)
shape_strategy = st.one_of(
    st.tuples(st.integers(0, 5), st.integers(1, 70)),
    st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(1, 20)),
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 2), st.sampled_from([255, 256, 257, 1025, 2047])),
)


def scaled(factor, shift=0.0):
    return lambda tensors, kwargs: ((tensors[0] * factor + shift, *tensors[1:]), kwargs)


class TestKdKlTopk(Laws):
    op = LawfulOp(
        name="kd_kl_topk",
        call=call,
        truth=truth,
        eager=eager,
        inputs=inputs,
        variants={
            "tail": {},
            "labels-row-taus": {"labels": "index", "taus": "row", "alpha": 0.3, "reduction": "none"},
            "ignored-weighted-mean": {"labels": "ignored", "taus": "one", "weight": True, "reduction": "mean"},
            "all listed": {"k": 1 << 20, "taus": "one", "reduction": "sum"},
        },
        shapes={"padded": (5, 10), "in place": (3, 300), "blocks": (2, 2500)},
        small=(4, 5),
        # with labels autograd adds two gradients, each rounded to storage: a third rounding, which that law has not
        dtypes=[torch.float64, torch.float32],
        raw=raw,
        draw=st.tuples(shape_strategy, variant_strategy),
        extremes={
            "huge spread": (scaled(300.0), 6000),
            "far from zero": (scaled(1.0, 1e4), 20),
            "tiny spread": (scaled(1e-3), 0.02),
        },
    )


# ---------------------------------------------------------------- its own
def test_by_hand():
    """Three classes, one listed with p = 1/2; student uniform, so q_tail = 2/3: D = 1/2 log 3/2 + 1/2 log 3/4."""
    log_probs, indices = torch.tensor([[0.5]], dtype=torch.float64).log(), torch.tensor([[2]])
    loss = topk_kd_loss(torch.zeros(1, 3, dtype=torch.float64), log_probs, indices, student_temperature=2.0)
    close(
        loss, 4 * 0.5 * (torch.tensor(1.5, dtype=torch.float64).log() + torch.tensor(0.75, dtype=torch.float64).log())
    )


def test_every_class_listed_is_kd_loss():
    student, teacher = (3 * torch.randn(6, 30, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(30, (6,))
    whole = topk_teacher(teacher, 30, 2.0)
    got = topk_kd_loss(student, *whole, labels, alpha=0.3, student_temperature=3.0)
    close(got, kd_loss(student, teacher, labels, alpha=0.3, student_temperature=3.0, teacher_temperature=2.0))


def test_more_classes_say_more():
    """Merging classes never raises a KL: the loss grows with k, up to that of all classes."""
    student, teacher = (3 * torch.randn(6, 30, dtype=torch.float64) for _ in range(2))
    losses = [topk_kd_loss(student, *topk_teacher(teacher, k), reduction="none") for k in range(1, 31)]
    for less, more in itertools.pairwise(losses):
        assert (more - less > -1e-12).all()
    assert (losses[-1] > losses[0] + 1e-3).all()


def test_a_sure_teacher_keeps_the_digits_of_its_tail():
    """p = 1 - 1e-12 is told apart from 1 by its logarithm, where 1 - sum p in fp32 would not be."""
    log_probs, indices = torch.tensor([[-1e-12]]), torch.tensor([[0]])
    student = torch.tensor([[60.0, 0.0, 0.0, 0.0]])
    q_tail = 3 * torch.tensor(-60.0, dtype=torch.float64).exp()
    want = 1e-12 * (torch.tensor(1e-12, dtype=torch.float64).log() - q_tail.log() - 1)
    torch.testing.assert_close(
        topk_kd_loss(student, log_probs, indices, student_temperature=1.0), want.float(), rtol=1e-4, atol=0
    )


def test_topk_teacher():
    teacher = torch.randn(3, 4, 50, dtype=torch.float64, requires_grad=True)
    log_probs, indices = topk_teacher(teacher, 5, 2.0)
    want, where = (teacher / 2).log_softmax(-1).topk(5, -1)
    close(log_probs, want.detach())
    assert indices.equal(where)
    assert not log_probs.requires_grad
    assert topk_teacher(teacher.detach().bfloat16(), 5)[0].dtype == torch.float32


def test_ignored_rows_may_hold_anything():
    student, (log_probs, indices) = torch.randn(3, 8), topk_teacher(torch.randn(3, 8), 2)
    labels = torch.tensor([1, -100, 2])
    keep = [0, 2]
    want = topk_kd_loss(student[keep], log_probs[keep], indices[keep], labels[keep], reduction="mean")
    student[1], log_probs[1], indices[1] = torch.nan, torch.nan, 99
    student.requires_grad_()
    got = topk_kd_loss(student, log_probs, indices, labels, reduction="mean")
    close(got.detach(), want, rtol=1e-6, atol=1e-7)
    got.backward()
    assert student.grad[1].eq(0).all()
    assert student.grad.isfinite().all()


def test_weights_learn():
    student, weight = torch.randn(4, 6, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    log_probs, indices = topk_teacher(torch.randn(4, 6, dtype=torch.float64), 2)
    assert torch.autograd.gradcheck(
        lambda s, w: topk_kd_loss(s, log_probs, indices, torch.tensor([0, 1, -100, 2]), weight=w),
        (student.requires_grad_(), weight.requires_grad_()),
    )


def test_threads_agree():
    student = torch.randn(300, 1000, requires_grad=True)
    teacher = topk_teacher(torch.randn(300, 1000), 20)
    one = torch.autograd.grad(topk_kd_loss(student, *teacher), student)[0]
    torch.set_num_threads(2)
    try:
        two = torch.autograd.grad(topk_kd_loss(student, *teacher), student)[0]
    finally:
        torch.set_num_threads(1)
    close(one, two, 0, 0)


STUDENT, LOG_P, INDEX = torch.zeros(2, 5), torch.full((2, 2), -1.0), torch.tensor([[0, 1], [2, 3]])
WRONG = {
    r"teacher_log_probs must be a tensor \[..., k\], got float": lambda: topk_kd_loss(STUDENT, 1.0, INDEX),
    r"must be \[..., k\] with the leading dimensions": lambda: topk_kd_loss(STUDENT, LOG_P[:1], INDEX[:1]),
    r"must have one shape \[..., k\]": lambda: topk_kd_loss(STUDENT, LOG_P, INDEX[:, :1]),
    "must be integer class indices, got torch.float32": lambda: topk_kd_loss(STUDENT, LOG_P, INDEX.float()),
    "must be floating point log-probabilities": lambda: topk_kd_loss(STUDENT, INDEX, INDEX),
    "have no gradient here; pass": lambda: topk_kd_loss(STUDENT, LOG_P.clone().requires_grad_(), INDEX),
    r"teacher_indices must be in \[0, 5\), got 5": lambda: topk_kd_loss(STUDENT, LOG_P, INDEX + 2),
    r"labels must be in \[0, 5\)": lambda: topk_kd_loss(STUDENT, LOG_P, INDEX, torch.tensor([0, 7])),
    r"k must be in \[1, 5\].*got 6": lambda: topk_teacher(STUDENT, 6),
    "k must be a whole number": lambda: topk_teacher(STUDENT, 2.0),
}


@pytest.mark.parametrize("message", WRONG)
def test_errors(message):
    with pytest.raises((TypeError, ValueError), match=message):
        WRONG[message]()

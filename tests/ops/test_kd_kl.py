"""kd_kl by the law suite, through the public kd_loss."""

import math

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from kdfast import kd_loss
from kdfast.losses.kd_kl import DIVERGENCES, SCALES
from kdfast.reference.kd_kl import Options, kd_kl_gradient
from kdfast.reference.kd_kl import kd_kl as reference
from tests.laws import LawfulOp, Laws

# Each variant says which of the definition's branches it takes; hypothesis draws the products.
VARIANTS = {
    "hinton": {},
    "soft_ce-plain-temperatures": {"divergence": "soft_ce", "scale": "none", "taus": "one"},
    "reverse": {"divergence": "reverse_kl"},
    "labels-tau4-squared-softmax": {"labels": "index", "taus": "float"},
    "labels-own-exponential": {"labels": "index", "taus": "row", "alpha": 0.3},
    "labels-reverse-smoothed": {"labels": "index", "divergence": "reverse_kl", "label_smoothing": 0.1},
    "ignored-rows-weighted-mean": {"labels": "ignored", "weight": True, "reduction": "mean", "taus": "one"},
    "mixup-targets-sum": {"labels": "soft", "reduction": "sum", "label_smoothing": 0.2, "taus": "one"},
    "hard-only": {"labels": "index", "alpha": 1.0, "reduction": "mean", "taus": "float"},
    "rows-product-scale": {"reduction": "none", "scale": "product", "taus": "row", "weight": True},
    "jsd": {"divergence": "jsd", "taus": "one"},
    "jsd-labels-softcap-rows": {"divergence": "jsd", "beta": 0.2, "labels": "index", "softcap": 4.0, "taus": "row"},
    "dkd": {"divergence": "dkd", "labels": "index", "alpha": 0.0, "scale": "product", "taus": "one"},
    "dkd-ignored-weighted-rows": {
        "divergence": "dkd", "beta": 0.7, "target_weight": 2.0, "labels": "ignored", "weight": True, "taus": "row",
        "reduction": "none",
    },
    "softcap-reverse-mixup": {"divergence": "reverse_kl", "softcap": 5.0, "logit_scale": 0.5, "labels": "soft"},
    "logit-scale": {"logit_scale": 0.25, "labels": "index", "label_smoothing": 0.1},
}  # fmt: skip


def inputs(generator, shape, dtype, variant):
    *lead, classes = shape
    real = torch.float64 if dtype == torch.float64 else torch.float32
    student, teacher = ((3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2))
    taus = variant.get("taus", "float")
    kwargs = {k: v for k, v in variant.items() if k not in ("labels", "weight", "taus")}
    tensors = [student, teacher]
    if taus == "float":
        kwargs |= {"student_temperature": 4.0, "teacher_temperature": 2.5}
    else:
        size = {"one": (), "row": tuple(lead)}[taus]
        tensors += [1 + 3 * torch.rand(size, generator=generator, dtype=torch.float64).to(real) for _ in range(2)]
    if variant.get("weight"):
        kwargs["weight"] = torch.rand(lead, generator=generator, dtype=torch.float64).to(real)
    kind = variant.get("labels")
    if kind in ("index", "ignored"):
        kwargs["labels"] = torch.randint(classes, lead, generator=generator)
        if kind == "ignored":
            kwargs["labels"].view(-1)[::3] = -100
    elif kind == "soft":
        kwargs["labels"] = torch.rand(shape, generator=generator, dtype=torch.float64).softmax(-1).to(real)
    return tuple(tensors), kwargs


def with_temperatures(function):
    def call(student, teacher, tau_s=None, tau_t=None, **kwargs):
        if tau_s is not None:
            kwargs |= {"student_temperature": tau_s, "teacher_temperature": tau_t}
        return function(student, teacher, **kwargs)

    return call


@with_temperatures
def truth(
    student,
    teacher,
    labels=None,
    *,
    alpha=0.5,
    student_temperature=4.0,
    teacher_temperature=None,
    scale="tau2",
    divergence="forward_kl",
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    reduction="batchmean",
    beta=None,
    target_weight=1.0,
    softcap=None,
    logit_scale=1.0,
):
    """kd_loss, spelled out over the definition."""
    shape, classes = student.shape, student.shape[-1]
    rows = student.numel() // classes

    def temperature(tau):
        return torch.as_tensor(tau, dtype=student.dtype).expand(shape[:-1]).reshape(rows)

    soft = labels is not None and labels.is_floating_point()
    loss = reference(
        student.reshape(rows, classes), teacher.reshape(rows, classes),
        temperature(student_temperature),
        temperature(student_temperature if teacher_temperature is None else teacher_temperature),
        None if soft or labels is None else labels.reshape(rows), labels.reshape(rows, classes) if soft else None,
        None if weight is None else weight.reshape(rows),
        Options(1.0, 1.0, alpha if labels is not None else 0.0, label_smoothing, ignore_index, DIVERGENCES[divergence],
                SCALES[scale], {"dkd": 8.0}.get(divergence, 0.5) if beta is None else beta, target_weight,
                softcap or 0.0, logit_scale),
    )  # fmt: skip
    counted = rows if soft or labels is None else int((labels != ignore_index).sum())
    if reduction == "none":
        return loss.reshape(shape[:-1])
    return (
        loss.sum()
        / {"sum": 1, "mean": max(counted, 1), "batchmean": max(shape[0], 1) if len(shape) > 1 else 1}[reduction]
    )


def kl(log_p, log_q):
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1, keepdim=True)


@with_temperatures
def eager(
    student,
    teacher,
    labels=None,
    *,
    student_temperature,
    teacher_temperature,
    alpha=0.5,
    scale="tau2",
    divergence="forward_kl",
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    reduction="batchmean",
    beta=None,
    target_weight=1.0,
    softcap=None,
    logit_scale=1.0,
):
    """What one writes in PyTorch, in the logits' own dtype."""
    student, teacher = student * logit_scale, teacher * logit_scale
    if softcap is not None:
        student, teacher = softcap * torch.tanh(student / softcap), softcap * torch.tanh(teacher / softcap)
    tau_s, tau_t = (
        t.to(student.dtype).unsqueeze(-1) if isinstance(t, torch.Tensor) else t
        for t in (student_temperature, teacher_temperature)
    )
    log_q, log_p = F.log_softmax(student / tau_s, -1), F.log_softmax(teacher / tau_t, -1)
    if divergence == "soft_ce":
        soft = -(log_p.exp() * log_q).sum(-1, keepdim=True)
    elif divergence == "jsd":
        beta = 0.5 if beta is None else beta
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        soft = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    elif divergence == "dkd":
        label = F.one_hot(labels.clamp(min=0), student.shape[-1]).bool()
        pairs, others = [], []
        for z in (teacher / tau_t, student / tau_s):
            rest = z.masked_fill(label, -torch.inf)
            pair = torch.stack([z[label].reshape(labels.shape), rest.logsumexp(-1)], -1)
            pairs.append(pair.log_softmax(-1))
            others.append(rest.log_softmax(-1).masked_fill(label, 0))  # adds nothing: exp(0) (0 - 0)
        soft = target_weight * kl(*pairs) + (8.0 if beta is None else beta) * kl(*others)
    else:
        pair = (log_q, log_p) if divergence == "forward_kl" else (log_p, log_q)
        soft = F.kl_div(*pair, reduction="none", log_target=True).sum(-1, keepdim=True)
    factor = {"tau2": tau_s * tau_s, "product": tau_s * tau_t, "none": 1.0}[scale]
    loss = (factor * soft).squeeze(-1)
    counted = torch.ones(loss.shape, dtype=torch.bool)
    if labels is not None:
        target = labels.to(student.dtype) if labels.is_floating_point() else labels
        options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
        hard = F.cross_entropy(student, target, reduction="none", **options)
        if not labels.is_floating_point():
            counted = labels != ignore_index
        loss = alpha * hard + (1 - alpha) * loss
    loss = torch.where(counted, loss, 0)
    loss = loss if weight is None else weight.to(loss.dtype) * loss
    if reduction == "none":
        return loss
    return loss.sum() / {"sum": 1, "mean": counted.sum(), "batchmean": student.shape[0]}[reduction]


def mask_classes(tensors, kwargs):
    """The first five classes masked in both, as unused vocabulary is; no label may lie there."""
    student, teacher, *rest = (t.clone() for t in tensors)
    student[:, :5] = teacher[:, :5] = -torch.inf
    labels = kwargs.get("labels")
    if labels is not None and labels.is_floating_point():
        kwargs["labels"] = labels.index_fill(-1, torch.arange(5), 0)
    elif labels is not None:
        kwargs["labels"] = torch.where(labels >= 0, labels.clamp(min=5), labels)
    return (student, teacher, *rest), kwargs


def scaled(factor, shift=0.0):
    def change(tensors, kwargs):
        student, teacher, *rest = tensors
        return (student * factor + shift, teacher * factor - shift, *rest), kwargs

    return change


def raw():
    """The dispatcher's ops with every optional input present and absent."""
    g = torch.Generator().manual_seed(0)
    s, t = (torch.randn(4, 9, generator=g) for _ in range(2))
    tau, per_row, weight = torch.tensor([2.0]), 1 + torch.rand(4, generator=g), torch.rand(4, generator=g)
    labels, target = torch.tensor([0, 3, -100, 8]), torch.rand(4, 9, generator=g).softmax(-1)
    plain = Options(4.0, 4.0)
    mixed = Options(1.0, 1.0, 0.4, 0.1, -100, 1, 1)
    mixture, decoupled = mixed._replace(divergence=3, softcap=5.0), mixed._replace(divergence=4, beta=8.0)
    bare = (s, t, None, None, None, None, None)
    learned = (s.clone().requires_grad_(), t.clone().requires_grad_(), tau.clone().requires_grad_(),
               per_row.clone().requires_grad_(), labels, None, weight)  # fmt: skip
    soft = (s, t, tau, per_row, None, target, None)
    stats = torch.ops.kdfast.kd_kl(*bare, *plain, False)[1]
    return [
        (torch.ops.kdfast.kd_kl.default, (*bare, *plain, False)),
        (torch.ops.kdfast.kd_kl.default, (*learned, *mixed, True)),
        (torch.ops.kdfast.kd_kl.default, (*soft, *mixed, True)),
        (torch.ops.kdfast.kd_kl.default, (*learned, *decoupled, True)),
        (torch.ops.kdfast.kd_kl_backward.default, (torch.ones(4), *soft, stats, *mixture, True, True)),
        (torch.ops.kdfast.kd_kl_backward.default, (torch.ones(4), *bare, stats, *plain, True, False)),
        (torch.ops.kdfast.kd_kl_backward.default, (torch.ones(4), *soft, stats, *mixed, True, True)),
        (torch.ops.kdfast.kd_kl_value_and_grad.default, (*bare, *plain, False, 0.25)),
    ]


def possible(variant):
    """What was drawn, with what its divergence asks for and without what it has none of."""
    variant = dict(variant)
    beta, target_weight = variant.pop("beta"), variant.pop("target_weight")
    if variant["divergence"] == "dkd":
        variant |= {"beta": 10 * beta, "target_weight": target_weight}
        variant["labels"] = "ignored" if variant["labels"] == "ignored" else "index"
    elif variant["divergence"] == "jsd":
        variant["beta"] = beta
    return variant


variant_strategy = st.fixed_dictionaries(
    {
        "divergence": st.sampled_from(list(DIVERGENCES)),
        "scale": st.sampled_from(list(SCALES)),
        "labels": st.sampled_from([None, "index", "ignored", "soft"]),
        "alpha": st.sampled_from([0.0, 0.25, 1.0]),
        "label_smoothing": st.sampled_from([0.0, 0.15]),
        "taus": st.sampled_from(["float", "one", "row"]),
        "weight": st.booleans(),
        "reduction": st.sampled_from(["none", "sum", "mean", "batchmean"]),
        "beta": st.sampled_from([0.1, 0.5, 0.8]),
        "target_weight": st.sampled_from([0.0, 1.0, 1.5]),
        "softcap": st.sampled_from([None, 3.0]),
        "logit_scale": st.sampled_from([1.0, 0.5]),
    }
).map(possible)
shape_strategy = st.one_of(
    st.tuples(st.integers(0, 5), st.integers(1, 70)),
    st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(1, 20)),
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 2), st.sampled_from([255, 256, 257, 1024, 1025, 2047, 4099])),
)


class TestKdKl(Laws):
    op = LawfulOp(
        name="kd_kl",
        call=with_temperatures(kd_loss),
        truth=truth,
        eager=eager,
        inputs=inputs,
        variants=VARIANTS,
        shapes={
            "one vector, padded": (5, 10),
            "several vectors, ragged, copied": (7, 100),
            "whole vectors, in place": (4, 128),
            "ragged, in place, several blocks": (3, 2500),
        },
        small=(4, 6),
        raw=raw,
        draw=st.tuples(shape_strategy, variant_strategy),
        extremes={
            "masked classes": (mask_classes, 20),
            "huge spread": (scaled(300.0), 6000),
            "far from zero": (scaled(1.0, 1e4), 20),
            "tiny spread": (scaled(1e-3), 0.02),
        },
        extreme_shapes=st.tuples(st.integers(1, 5), st.integers(6, 70) | st.sampled_from([128, 257, 1025, 4099])),
    )


def test_hard_labels_alone_do_not_see_the_teacher():
    student, teacher = torch.randn(2, 3, 5, dtype=torch.float64)
    rest = (None, None, torch.tensor([0, 4, 2]), None, None, Options(alpha=1.0))
    expected = kd_kl_gradient(student, teacher, *rest)
    for x, e in zip(kd_kl_gradient(student, teacher.fill_(math.nan), *rest), expected, strict=True):
        torch.testing.assert_close(x, e, rtol=0, atol=0)


def test_strided_labels_and_temperatures_beside_contiguous_logits():
    """The call of a training loop, whose sweep also makes the gradient: a half of a batch's labels."""
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    labels, tau = torch.randint(5, (12,)), torch.rand(12) + 1
    found = []
    for change in (torch.Tensor.contiguous, lambda x: x):
        s = student.clone().requires_grad_()
        given = change(tau[::2]).detach().requires_grad_() if change is torch.Tensor.contiguous else tau[::2]
        loss = kd_loss(s, teacher, change(labels[::2]), student_temperature=given, teacher_temperature=2.0)
        found.append((loss.detach(), *torch.autograd.grad(loss, s)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)

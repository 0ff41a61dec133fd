"""kd_kl by the law suite, through the public kd_loss, and what is its own."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from kdfast import KDLoss, kd_loss
from kdfast.losses.kd_kl import DIVERGENCES, SCALES
from kdfast.ops import kd_kl as ops
from kdfast.reference.kd_kl import Options
from kdfast.reference.kd_kl import kd_kl as reference
from tests.laws import LawfulOp, Laws, close

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


def test_hinton_by_hand():
    """Two classes, by pencil: p = (1/2, 1/2), q = (3/4, 1/4); KL = log(2/sqrt 3), times tau^2 = 4."""
    student = torch.tensor([[2 * torch.tensor(3.0, dtype=torch.float64).log(), 0.0]])
    loss = kd_loss(student, torch.zeros(1, 2, dtype=torch.float64), student_temperature=2.0)
    close(loss, 4 * torch.log(torch.tensor(2 / 3**0.5, dtype=torch.float64)))


def test_equal_logits_have_no_divergence_and_shifts_do_not_matter():
    z = 5 * torch.randn(16, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    close(kd_loss(z, z), torch.zeros((), dtype=torch.float64))
    other = z.flip(0)
    close(kd_loss(z + 7, other - 3), kd_loss(z, other), rtol=1e-12)
    assert kd_loss(z, other) > 0


def test_ignored_rows_may_hold_anything():
    student, teacher = torch.randn(3, 8), torch.randn(3, 8)
    labels = torch.tensor([1, -100, 2])
    want = kd_loss(student[[0, 2]], teacher[[0, 2]], labels[[0, 2]], reduction="mean")
    student[1], teacher[1] = torch.nan, torch.inf
    student.requires_grad_()
    got = kd_loss(student, teacher, labels, reduction="mean")
    close(got, want, rtol=1e-6, atol=1e-7)
    got.backward()
    assert student.grad[1].eq(0).all()
    assert student.grad.isfinite().all()


def test_no_row_counts():
    student = torch.randn(2, 5, requires_grad=True)
    loss = kd_loss(student, torch.randn(2, 5), torch.tensor([-100, -100]), reduction="mean")
    loss.backward()
    assert loss == 0
    assert student.grad.eq(0).all()
    assert kd_loss(torch.zeros(0, 5), torch.zeros(0, 5)) == 0


def test_one_class_has_nothing_to_say():
    student = torch.randn(4, 1, requires_grad=True)
    loss = kd_loss(student, torch.randn(4, 1), torch.zeros(4, dtype=torch.int64))
    loss.backward()
    close(loss.detach(), torch.zeros(()), 0, 1e-7)
    close(student.grad, torch.zeros(4, 1), 0, 1e-7)


def test_a_class_only_the_student_masks_is_infinitely_bad():
    student, teacher = torch.zeros(1, 3), torch.zeros(1, 3)
    student[0, 0] = -torch.inf
    assert kd_loss(student, teacher) == torch.inf
    assert kd_loss(teacher, student).isfinite()  # the teacher's masked class asks nothing of the student


def test_weights_learn():
    student, teacher, weight = (torch.rand(s, dtype=torch.float64, requires_grad=True) for s in ((4, 5), (4, 5), (4,)))
    labels = torch.tensor([0, 1, -100, 2])
    for reduction in ("none", "sum", "mean", "batchmean"):
        assert torch.autograd.gradcheck(
            lambda s, w, r=reduction: kd_loss(s, teacher.detach(), labels, weight=w, reduction=r), (student, weight)
        )
        close(
            kd_loss(student, teacher, labels, weight=weight, reduction=reduction),
            kd_loss(student, teacher, labels, weight=weight.detach(), reduction=reduction),
        )


def test_one_temperature_for_both_gets_both_gradients():
    student, teacher = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    tau = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: kd_loss(student, teacher, student_temperature=t), (tau,))


def test_mixed_dtypes_use_the_wider():
    student = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(4, 6)
    loss = kd_loss(student, teacher)
    loss.backward()
    wide = kd_loss(student.detach().float().requires_grad_(), teacher)
    close(loss.detach(), wide.detach(), 0, 0)
    assert student.grad.dtype == torch.bfloat16


def test_no_grad_and_module():
    student, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    with torch.no_grad():
        assert not kd_loss(student, teacher).requires_grad
    criterion = KDLoss(alpha=0.2, student_temperature=3.0)
    labels = torch.tensor([0, 1, 2, 3])
    close(
        criterion(student, teacher, labels), kd_loss(student, teacher, labels, alpha=0.2, student_temperature=3.0), 0, 0
    )
    assert "alpha=0.2" in repr(criterion)
    with pytest.raises(TypeError, match=r"KDLoss takes the keyword arguments of kd_loss \(.*\), got tau"):
        KDLoss(tau=3.0)


def test_threads_agree():
    student, teacher = torch.randn(300, 1000, requires_grad=True), torch.randn(300, 1000)
    one = torch.autograd.grad(kd_loss(student, teacher), student)[0]
    torch.set_num_threads(2)
    try:
        two = torch.autograd.grad(kd_loss(student, teacher), student)[0]
    finally:
        torch.set_num_threads(1)
    close(one, two, 0, 0)


def test_compiled_inside_torch_func():
    """There the op's jvp would be silent zeros and Dynamo refuses the Function: the door must choose the reference."""
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    tangent = torch.randn(3, 5)

    def directional(s):
        return torch.func.jvp(lambda z: kd_loss(z, teacher), (s,), (tangent,))[1]

    want = (torch.func.grad(lambda s: kd_loss(s, teacher))(student) * tangent).sum()
    got = torch.compile(directional, fullgraph=True)(student)  # fp64: so is a plain (z * 2.0).sum() under this pair
    close(got.to(want.dtype), want, rtol=1e-5, atol=1e-6)
    got = torch.compile(torch.func.grad(lambda s: kd_loss(s, teacher)), fullgraph=True)(student)
    close(got, torch.func.grad(lambda s: kd_loss(s, teacher))(student), rtol=1e-5, atol=1e-6)


def test_eager_apply_is_the_public_apply():
    """The shortcut round autograd.Function.apply gives what the public one gives."""
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    args = (student, teacher, None, None, None, None, None, Options(2.0, 2.0), 1.0)
    public, ours = ops.KdKl.apply(*args)[0], ops._apply(*args)[0]
    close(ours, public, 0, 0)
    close(torch.autograd.grad(ours, student)[0], torch.autograd.grad(public, student)[0], 0, 0)

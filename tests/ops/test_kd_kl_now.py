"""The C++ nodes of the plain call (csrc/autograd) against the general way in Python, bit for bit."""

import gc
import threading
import weakref

import pytest
import torch

from kdfast import _native, kd_loss
from kdfast.losses import kd_kl as losses

pytestmark = pytest.mark.skipif(_native.autograd is None, reason="the C++ nodes are not built for this torch")

OPTIONS = [
    {},
    {"alpha": 0.3},
    {"alpha": 1.0},
    {"divergence": "reverse_kl", "reduction": "sum"},
    {"divergence": "soft_ce", "scale": "none", "teacher_temperature": 2},
    {"divergence": "jsd", "student_temperature": 1.5, "scale": "product"},
    {"label_smoothing": 0.1, "ignore_index": 1},
    {"softcap": 3.0, "logit_scale": 0.5},
]


def batch(rows=5, classes=7, dtype=torch.float32, labels=True, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, classes, generator=generator).to(device, dtype) for _ in range(2))
    indices = torch.randint(classes, (rows,), generator=generator).to(device) if labels else None
    return student.requires_grad_(), teacher, indices


def is_now(loss) -> bool:
    return loss.grad_fn.name() == "KdKlNow"


@pytest.fixture
def general(monkeypatch):
    """kd_loss as it is without the C++ nodes."""

    def call(*args, **options):
        with monkeypatch.context() as context:
            context.setattr(losses, "_now", None)
            loss = kd_loss(*args, **options)
        assert not is_now(loss)
        return loss

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_same_bits_as_the_general_way(general, device, labels, options, dtype):
    student, teacher, indices = batch(dtype=dtype, labels=labels, device=device)
    options = options if device == "cpu" else options | {"fuse_backward": True}
    loss, expected = kd_loss(student, teacher, indices, **options), general(student, teacher, indices, **options)
    assert is_now(loss)
    assert torch.equal(loss, expected) and loss.dtype == expected.dtype
    (ours,) = torch.autograd.grad(3.0 * loss, student)
    (theirs,) = torch.autograd.grad(3.0 * expected, student)
    assert torch.equal(ours, theirs) and ours.dtype == dtype


def test_beside_the_cpu_where_the_gradient_is_made_at_once():
    """Meta tensors stand for a GPU's: no value is read, and the gradient is made and scaled by ops."""
    student, teacher, indices = batch(device="meta", dtype=torch.bfloat16)
    loss = kd_loss(student, teacher, indices, alpha=0.3, fuse_backward=True)
    assert is_now(loss) and loss.is_meta and loss.dtype == torch.float32
    (3.0 * loss).backward()
    assert student.grad.is_meta and student.grad.shape == student.shape and student.grad.dtype == torch.bfloat16
    (product,) = torch.autograd.grad(kd_loss(student, teacher, fuse_backward=True), student, create_graph=True)
    assert product.requires_grad
    assert not is_now(kd_loss(student, teacher, indices))
    assert not is_now(kd_loss(student, teacher, indices.int(), fuse_backward=True))


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(general, rows):
    student, teacher, indices = batch(rows=rows)
    loss = kd_loss(student, teacher, indices)
    assert is_now(loss) and torch.equal(loss, general(student, teacher, indices))
    loss.backward()
    assert student.grad.shape == student.shape


def test_second_order_and_a_second_backward(general):
    student, teacher, indices = batch(dtype=torch.float64)
    direction = torch.randn_like(student)

    def orders(loss):
        (first,) = torch.autograd.grad(loss, student, create_graph=True)
        (second,) = torch.autograd.grad((first * direction).sum(), student)
        (again,) = torch.autograd.grad(loss, student)
        return first.detach(), second, again

    ours = orders(kd_loss(student, teacher, indices, alpha=0.3))
    for a, b in zip(ours, orders(general(student, teacher, indices, alpha=0.3)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert ours[1].abs().max() > 0
    torch.testing.assert_close(ours[0], ours[2], rtol=1e-12, atol=1e-14)


def test_retained_graph_gives_the_same_gradient_twice():
    student, teacher, indices = batch()
    loss = kd_loss(student, teacher, indices)
    loss.backward(retain_graph=True)
    first, student.grad = student.grad, None
    loss.backward()
    torch.testing.assert_close(student.grad, first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_batched_cotangents():
    student, teacher, indices = batch(dtype=torch.float64)
    loss = kd_loss(student, teacher, indices)
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (many,) = torch.autograd.grad(loss, student, factors, is_grads_batched=True, retain_graph=True)
    (one,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(many, factors[:, None, None] * one)


def test_student_changed_in_place_before_a_second_backward_is_noticed():
    leaf, teacher, indices = batch()
    student = leaf * 1.0
    loss = kd_loss(student, teacher, indices)
    student.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_backward_in_another_thread():
    student, teacher, indices = batch()
    loss = kd_loss(student, teacher, indices)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert student.grad is not None


def test_nothing_is_kept_alive():
    student, teacher, indices = batch()
    seen = weakref.ref(teacher)
    kd_loss(student, teacher, indices).backward()
    del teacher
    gc.collect()
    assert seen() is None


class Subclass(torch.Tensor):
    pass


def _forward_mode(student, teacher):
    with torch.autograd.forward_ad.dual_level():
        return kd_loss(student, teacher)


@pytest.mark.parametrize(
    "call",
    [
        lambda s, t: kd_loss(s, t.requires_grad_()),
        lambda s, t: kd_loss(s.T.contiguous().T, t),
        lambda s, t: kd_loss(s[None], t[None]),
        lambda s, t: kd_loss(s, t, student_temperature=torch.tensor(2.0)),
        lambda s, t: kd_loss(s, t, weight=torch.ones(5)),
        lambda s, t: kd_loss(s, t, reduction="mean"),
        lambda s, t: kd_loss(s, t.as_subclass(Subclass)),
        lambda s, t: kd_loss(s, t, torch.full((5, 7), 1 / 7)),
        _forward_mode,
    ],
    ids=[
        "teacher learns",
        "strides",
        "3-D",
        "temperature",
        "weight",
        "mean",
        "subclass",
        "probabilities",
        "forward mode",
    ],
)
def test_what_is_not_plain_goes_the_general_way(call):
    student, teacher, _ = batch()
    loss = call(student, teacher)
    assert loss.requires_grad and not is_now(loss)


def test_transforms_go_the_general_way():
    student, teacher, _ = batch(dtype=torch.float64)
    gradient = torch.func.grad(lambda s: kd_loss(s, teacher))(student.detach())
    (expected,) = torch.autograd.grad(kd_loss(student, teacher), student)
    torch.testing.assert_close(gradient, expected)
    assert not kd_loss(student.detach(), teacher).requires_grad
    with torch.no_grad():
        assert not kd_loss(student, teacher).requires_grad


def test_errors_are_those_of_the_general_way():
    student, teacher, indices = batch()
    with pytest.raises(ValueError, match=r"labels must be in \[0, 7\)"):
        kd_loss(student, teacher, indices + 7)
    with pytest.raises(ValueError, match="NaN"):
        kd_loss(student, teacher * float("nan"), indices)


# ---------------------------------------------------------------- the gradient's node, kd_kl_gradient.cpp
GRADIENT_OPTIONS = [
    {},
    {"divergence": "reverse_kl", "scale": "product", "teacher_temperature": 2.0},
    {"divergence": "soft_ce", "reduction": "none"},
    {"alpha": 0.3, "label_smoothing": 0.1, "ignore_index": 1, "reduction": "mean"},
    {"weight": torch.tensor([0.0, 1.0, 2.0, 0.5, 1.5])},
]


def gradients(monkeypatch, student, teacher, indices, factor=1.0, nodes=True, **options):
    """The gradients of (student, teacher), to be differentiated, by the nodes or by the general way."""
    with monkeypatch.context() as context:
        if not nodes:
            context.setattr(losses, "_now", None)
            context.setattr(_native, "autograd", None)
        loss = kd_loss(student, teacher, indices, **options).sum() * factor
        first = torch.autograd.grad(loss, [x for x in (student, teacher) if x.requires_grad], create_graph=True)
    assert all((x.grad_fn.name() == "KdKlGradient") == nodes for x in first)
    return first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", GRADIENT_OPTIONS, ids=str)
def test_the_gradient_and_its_derivatives_have_the_same_bits(monkeypatch, options, dtype):
    student, teacher, indices = batch(dtype=dtype, labels="alpha" in options)
    teacher.requires_grad_()
    if "weight" in options and dtype == torch.float64:
        options = {"weight": options["weight"].double()}
    w = [torch.randn(5, 7, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (1, 2)]
    found = []
    for nodes in (True, False):
        first = gradients(monkeypatch, student, teacher, indices, nodes=nodes, **options)
        keep = {"retain_graph": True}
        found.append(
            [
                *first,
                *torch.autograd.grad(first, (student, teacher), w, **keep),
                *torch.autograd.grad(first[0], teacher, w[0], **keep),  # one direction, one product
                *torch.autograd.grad(first[1], student, w[1].T.contiguous().T, **keep),
            ]
        )
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == dtype and ours.abs().sum() > 0


def test_the_student_alone_learns(monkeypatch):
    student, teacher, indices = batch()
    ours, theirs = (gradients(monkeypatch, student, teacher, indices, nodes=nodes) for nodes in (True, False))
    w = torch.randn(5, 7)
    assert torch.equal(*(torch.autograd.grad(first, student, w)[0] for first in (ours, theirs)))


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "jsd"},
        {"softcap": 3.0},
        {"logit_scale": 0.5},
        {"student_temperature": torch.tensor(2.0)},
        {"labels": torch.full((5, 7), 1 / 7)},
    ],
    ids=str,
)
def test_a_gradient_that_is_not_plain_goes_the_general_way(options):
    student, teacher, _ = batch()
    loss = kd_loss(student, teacher.requires_grad_(), **options)
    (first,) = torch.autograd.grad(loss, student, create_graph=True)
    assert first.grad_fn.name() == "KdKlBackwardBackward"


def test_what_the_gradients_node_hands_to_the_general_way(monkeypatch):
    """A third order, many cotangents, and a derivative in the loss's own factor."""
    student, teacher, indices = batch(dtype=torch.float64)
    teacher.requires_grad_()
    factor = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, 7, dtype=torch.float64)
    many = torch.stack([w, -2 * w])
    found = []
    for nodes in (True, False):
        first, _ = gradients(monkeypatch, student, teacher, indices, factor, nodes=nodes, alpha=0.3)
        keep = {"retain_graph": True}
        second = torch.autograd.grad(first, (student, teacher, factor), w, create_graph=True)
        third = torch.autograd.grad([x.square().sum() for x in second], (student, teacher, factor), **keep)
        batched = torch.autograd.grad(first, (student, teacher), many, is_grads_batched=True)
        found.append([*second, *third, *batched])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        assert ours.abs().sum() > 0


def test_the_gradients_node_notices_what_became_of_its_tensors(monkeypatch):
    leaf, teacher, indices = batch()
    student = leaf * 1.0
    (first,) = torch.autograd.grad(kd_loss(student, teacher, indices), student, create_graph=True)
    assert first.grad_fn.name() == "KdKlGradient"
    student.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(first.sum(), leaf)
    student, teacher, indices = batch()
    (first,) = gradients(monkeypatch, student, teacher, indices)
    torch.autograd.grad(first.sum(), student)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(first.sum(), student)
    seen = weakref.ref(teacher)
    del teacher
    gc.collect()
    assert seen() is None

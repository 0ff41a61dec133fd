"""incorrect_brier by the law suite, through the public function, and what is its own."""

import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from kdfast import incorrect_brier
from kdfast.reference.incorrect_brier import incorrect_brier as reference
from tests.laws import LawfulOp, Laws, close

VARIANTS = {
    "labels-mean": {"labels": "index"},
    "labels-rows": {"labels": "index", "reduction": "none"},
    "ignored-rows-mean": {"labels": "ignored"},
    "probabilities-sum": {"labels": "soft", "reduction": "sum"},
}


def inputs(generator, shape, dtype, variant):
    *lead, classes = shape
    logits = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    kwargs = {k: v for k, v in variant.items() if k != "labels"}
    if variant["labels"] == "soft":
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        real = torch.float64 if dtype == torch.float64 else torch.float32
        kwargs["labels"] = (logits.double() + 4 * noise).softmax(-1).to(real)  # some rows agree with the prediction
        return (logits,), kwargs
    labels = torch.randint(classes, lead, generator=generator)
    right = torch.arange(labels.numel()).reshape(lead) % 4 == 1
    labels = torch.where(right, logits.argmax(-1), labels)
    if variant["labels"] == "ignored":
        labels.view(-1)[::3] = -100
    return (logits,), kwargs | {"labels": labels}


def truth(logits, labels, *, reduction="mean", ignore_index=-100):
    """incorrect_brier, spelled out over the definition."""
    shape, classes = logits.shape, logits.shape[-1]
    rows = logits.numel() // classes
    soft = labels.is_floating_point()
    indices, target = (None, labels.reshape(rows, classes)) if soft else (labels.reshape(rows), None)
    loss = reference(logits.reshape(rows, classes), indices, target, ignore_index)
    counted = rows if soft else int((labels != ignore_index).sum())
    return (
        loss.reshape(shape[:-1]) if reduction == "none" else loss.sum() / {"sum": 1, "mean": max(counted, 1)}[reduction]
    )


def eager(logits, labels, *, reduction="mean", ignore_index=-100):
    """What one writes in PyTorch, in the logits' own dtype."""
    p = logits.softmax(-1)
    counted = torch.ones(logits.shape[:-1], dtype=torch.bool)
    if not labels.is_floating_point():
        counted = labels != ignore_index
        labels = F.one_hot(labels.where(counted, 0), logits.shape[-1])
    y = labels.to(logits.dtype)
    wrong = (logits.argmax(-1) != y.argmax(-1)) & counted
    loss = (p - y).square().sum(-1) * wrong
    return loss if reduction == "none" else loss.sum() / (1 if reduction == "sum" else counted.sum())


def mask_classes(tensors, kwargs):
    """The first five classes masked, as unused vocabulary is; no label may lie there."""
    logits = tensors[0].clone()
    logits[:, :5] = -torch.inf
    labels = kwargs["labels"]
    if labels.is_floating_point():
        kwargs["labels"] = labels.index_fill(-1, torch.arange(5), 0)
    else:
        kwargs["labels"] = torch.where(labels >= 0, labels.clamp(min=5), labels)
    return (logits,), kwargs


def scaled(factor, shift=0.0):
    return lambda tensors, kwargs: ((tensors[0] * factor + shift,), kwargs)


def raw():
    """The dispatcher's ops with labels and with probabilities, with and without gradient."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4, 9, generator=g)
    labels, target = torch.tensor([0, 3, -100, 8]), torch.rand(4, 9, generator=g).softmax(-1)
    arguments = [(z, labels, None), (z, None, target), (z.bfloat16(), labels, None)]
    ops, calls = torch.ops.kdfast, []
    for one in arguments:
        stats = ops.incorrect_brier(*one, -100)[1]
        calls += [
            (ops.incorrect_brier.default, (*one, -100)),
            (ops.incorrect_brier_backward.default, (torch.ones(4), *one, stats, -100)),
            (ops.incorrect_brier_value_and_grad.default, (*one, -100, 0.25)),
        ]
    return [*calls, (ops.incorrect_brier.default, (z.clone().requires_grad_(), labels, None, -100))]


class TestIncorrectBrier(Laws):
    op = LawfulOp(
        name="incorrect_brier",
        call=incorrect_brier,
        truth=truth,
        eager=eager,
        inputs=inputs,
        variants=VARIANTS,
        shapes={
            "one vector, padded": (6, 10),
            "several vectors, ragged, copied": (7, 100),
            "whole vectors, in place": (6, 128),
            "ragged, in place, several blocks": (6, 2500),
        },
        small=(4, 6),
        raw=raw,
        draw=st.tuples(
            st.one_of(
                st.tuples(st.integers(0, 6), st.integers(1, 70)),
                st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(1, 20)),
                st.tuples(st.integers(1, 40)),
                st.tuples(st.integers(1, 2), st.sampled_from([255, 256, 257, 1024, 1025, 2047, 4099])),
            ),
            st.fixed_dictionaries(
                {
                    "labels": st.sampled_from(["index", "ignored", "soft"]),
                    "reduction": st.sampled_from(["none", "sum", "mean"]),
                }
            ),
        ),
        extremes={
            "masked classes": (mask_classes, 20),
            "huge spread": (scaled(300.0), 6000),
            "far from zero": (scaled(1.0, 1e4), 20),
            "tiny spread": (scaled(1e-3), 0.02),
        },
    )


def test_by_hand():
    """p = (3/4, 1/4): labelled the second class it is wrong by 3/4 twice; labelled the first it is right."""
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0]], dtype=torch.float64).log().requires_grad_()
    loss = incorrect_brier(logits, torch.tensor([1, 0]), reduction="none")
    close(loss.detach(), torch.tensor([2 * 0.75**2, 0.0], dtype=torch.float64))
    # d loss / dz_0 = 4 (3/4) d(3/4)/dz_0 = 3 * 3/16
    close(torch.autograd.grad(loss.sum(), logits)[0][0], torch.tensor([9 / 16, -9 / 16], dtype=torch.float64))


@pytest.mark.parametrize("classes", [5, 33, 300])
def test_the_first_of_equal_logits_is_the_prediction(classes):
    """Ties on either side of the label, and a tie with nothing but a later class."""
    logits = torch.zeros(3, classes, requires_grad=True)
    last, labels = classes - 1, torch.tensor([0, classes - 1, 1])
    with torch.no_grad():
        logits[2, 1] = logits[2, last] = 2.0
    loss = incorrect_brier(logits, labels, reduction="none")
    assert loss[0] == loss[2] == 0  # the label comes first among the largest
    close(loss[1].detach().double(), torch.tensor(1 - 1 / classes, dtype=torch.float64), 1e-6, 0)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert grad[[0, 2]].eq(0).all() and grad[1].ne(0).any()
    # equal probabilities: again the first is the class that should be predicted
    target = torch.full((3, classes), 1 / classes)
    target[1, [1, last]] = target[2, [0, last]] = 0.5
    wrong = incorrect_brier(logits.detach(), target, reduction="none") > 0
    assert wrong.tolist() == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_all_right_is_exactly_nothing(probabilities, reduction, dtype):
    logits = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    labels = logits.argmax(-1)
    if probabilities:
        labels = F.one_hot(labels, 40).float()
    loss = incorrect_brier(logits, labels, reduction=reduction)
    (grad,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), logits)
    for x in (loss, grad, second):
        assert x.eq(0).all()


def test_a_perfect_prediction_of_one_class():
    logits = torch.randn(4, 1, requires_grad=True)
    loss = incorrect_brier(logits, torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and logits.grad.eq(0).all()


def test_ignored_rows_may_hold_anything():
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([1, -100, 2])
    want = incorrect_brier(logits[[0, 2]], labels[[0, 2]])
    logits[1] = torch.nan
    logits.requires_grad_()
    got = incorrect_brier(logits, labels)
    close(got.detach(), want, rtol=1e-6, atol=1e-7)
    got.backward()
    assert logits.grad[1].eq(0).all() and logits.grad.isfinite().all()
    labels[1] = 7
    assert incorrect_brier(logits, labels, reduction="none")[1].isnan()
    assert incorrect_brier(logits, labels, ignore_index=7, reduction="none")[1] == 0


def test_nothing_counts():
    logits = torch.randn(2, 5, requires_grad=True)
    loss = incorrect_brier(logits, torch.tensor([-100, -100]))
    loss.backward()
    assert loss == 0 and logits.grad.eq(0).all()
    assert incorrect_brier(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)) == 0


@pytest.mark.parametrize("classes", [7, 300])
def test_bad_rows_are_nan_right_or_wrong_and_stay_alone(classes):
    """A NaN beside the label or at it, +inf at the label, no finite logit; probabilities with a NaN."""
    logits = torch.randn(6, classes, generator=torch.Generator().manual_seed(2))
    labels = logits.argmax(-1)
    labels[5] = (labels[5] + 1) % classes
    logits[0, labels[0] - 1] = logits[1, labels[1]] = torch.nan
    logits[2, labels[2]], logits[3] = torch.inf, -torch.inf
    logits.requires_grad_()
    for given in (labels, F.one_hot(labels, classes).float()):
        loss = incorrect_brier(logits, given, reduction="none")
        grad = torch.autograd.grad(loss.sum(), logits)[0]
        assert loss.isnan().tolist() == [True] * 4 + [False] * 2
        assert grad.isnan().any(-1).tolist() == [True] * 4 + [False] * 2
    target = F.one_hot(labels, classes).float()
    target[4, 0] = torch.nan
    assert incorrect_brier(logits, target, reduction="none")[4].isnan()
    want = reference(logits.double(), labels, None, -100)
    close(incorrect_brier(logits, labels, reduction="none")[4:].double(), want[4:], 1e-6, 1e-7)
    assert want.isnan().tolist() == [True] * 4 + [False] * 2


def test_threads_agree():
    logits = torch.randn(300, 1000, requires_grad=True)
    labels = torch.randint(1000, (300,))
    one = torch.autograd.grad(incorrect_brier(logits, labels), logits)[0]
    torch.set_num_threads(2)
    try:
        two = torch.autograd.grad(incorrect_brier(logits, labels), logits)[0]
    finally:
        torch.set_num_threads(1)
    close(one, two, 0, 0)


def test_the_two_paths_agree():
    """The gradient made in the forward sweep, and the one made from the statistics."""
    logits = torch.randn(20, 300, requires_grad=True)
    for labels in (torch.randint(300, (20,)), torch.rand(20, 300).softmax(-1)):
        now = torch.autograd.grad(incorrect_brier(logits, labels, reduction="sum"), logits)[0]
        later = torch.autograd.grad(incorrect_brier(logits, labels, reduction="none").sum(), logits)[0]
        close(now, later, 1e-6, 1e-8)


def test_labels_of_other_types():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([0, 1, 2, 3])
    want = incorrect_brier(logits, labels)
    for other in (labels.int(), labels.to(torch.uint8), F.one_hot(labels, 6).double(), F.one_hot(labels, 6).half()):
        close(incorrect_brier(logits, other), want, 1e-6, 0)


def test_compiled_inside_torch_func():
    """There the op's jvp would be silent zeros and Dynamo refuses the Function: the door must choose the reference."""
    logits, labels, tangent = torch.randn(3, 5), torch.tensor([4, 3, 2]), torch.randn(3, 5)

    def value(z):
        return incorrect_brier(z, labels)

    want = torch.func.grad(value)(logits)
    assert want.abs().max() > 0
    close(torch.compile(torch.func.grad(value), fullgraph=True)(logits), want, 1e-5, 1e-6)
    got = torch.compile(lambda z: torch.func.jvp(value, (z,), (tangent,))[1], fullgraph=True)(logits)
    close(got.to(want.dtype), (want * tangent).sum(), 1e-5, 1e-6)


ERRORS = {
    "logits": ((None, None), {}, TypeError, r"logits must be a tensor \[..., classes\], got NoneType"),
    "integers": ((torch.zeros(2, 3).long(), torch.zeros(2).long()), {}, TypeError, r"got torch.int64; call .float\(\)"),
    "scalar": ((torch.zeros(()), torch.zeros(()).long()), {}, ValueError, r"at least one class, got \[\]"),
    "no labels": ((torch.zeros(2, 3), None), {}, TypeError, r"labels must be a tensor of class indices or prob"),
    "shape": ((torch.zeros(2, 3), torch.zeros(3).long()), {}, ValueError, r"class indices must be \[2\], got \[3\]"),
    "range": ((torch.zeros(2, 3), torch.tensor([0, 3])), {}, ValueError, r"labels must be in \[0, 3\) or .*, got 3"),
    "reduction": (
        (torch.zeros(2, 3), torch.zeros(2).long()),
        {"reduction": "batchmean"},
        ValueError,
        r"reduction must be one of 'none', 'sum', 'mean', got 'batchmean'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case):
    arguments, options, error, text = ERRORS[case]
    with pytest.raises(error, match=text):
        incorrect_brier(*arguments, **options)

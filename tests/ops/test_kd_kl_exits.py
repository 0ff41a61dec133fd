"""kd_kl_exits by the law suite, through the public function, and what is its own."""

import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from kdfast import exits_kd_loss, kd_loss
from kdfast.reference.kd_kl import Options
from kdfast.reference.kd_kl_exits import kd_kl_exits as definition
from tests.laws import LawfulOp, Laws

DIVERGENCES = {"forward_kl": 0, "reverse_kl": 1, "soft_ce": 2}
VARIANTS = {
    "two exits": {"exits": 2},
    "one exit, labels": {"exits": 1, "hard": True, "alpha": 0.3, "student_temperature": 4.0},
    "two exits, ignored rows": {"exits": 2, "hard": True, "alpha": 0.5, "label_smoothing": 0.1, "reduction": "sum"},
    "reverse": {"exits": 2, "divergence": "reverse_kl", "student_temperature": 2.0, "scale": "none"},
}


def inputs(generator, shape, dtype, variant):
    rows, classes = shape
    kwargs = {k: v for k, v in variant.items() if k not in ("exits", "hard")}
    logits = [3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2 * variant["exits"])]
    kwargs["labels"] = None
    if variant.get("hard"):
        kwargs["labels"] = torch.randint(classes, (rows,), generator=generator)
        kwargs["labels"][::3] = -100
    return tuple(x.to(dtype) for x in logits), kwargs


def halves(logits):
    return logits[: len(logits) // 2], logits[len(logits) // 2 :]


def call(*logits, labels, **options):
    return exits_kd_loss(*halves(logits), labels, **options)


def truth(*logits, labels, **given):
    """The definition, spelled out."""
    tau = given.get("student_temperature", 1.0)
    options = Options(
        tau, tau, given.get("alpha", 0.5) if labels is not None else 0.0, given.get("label_smoothing", 0.0),
        divergence=DIVERGENCES[given.get("divergence", "forward_kl")], scale=2 if given.get("scale") == "none" else 0,
    )  # fmt: skip
    students, teachers = halves(logits)
    coefficient = 1.0 if given.get("reduction") == "sum" else 1.0 / max(students[0].shape[0], 1)
    return definition(list(students), list(teachers), labels, options, coefficient)


def eager(*logits, labels, alpha=0.5, student_temperature=1.0, label_smoothing=0.0, divergence="forward_kl",
          scale="tau2", reduction="batchmean"):  # fmt: skip
    """What one writes in PyTorch."""
    losses = []
    for s, t in zip(*halves(logits), strict=True):
        log_q, log_p = ((x / student_temperature).log_softmax(-1) for x in (s, t))
        a, b = (log_p, log_q) if divergence == "forward_kl" else (log_q, log_p)
        rows = F.kl_div(b, a, reduction="none", log_target=True).sum(-1)
        rows = rows * (student_temperature**2 if scale == "tau2" else 1)
        if labels is not None:
            hard = F.cross_entropy(s, labels, reduction="none", label_smoothing=label_smoothing)
            rows = alpha * hard + (1 - alpha) * rows * (labels != -100)
        losses.append(rows.sum() / (1 if reduction == "sum" else len(rows)))
    return torch.stack(losses)


def scaled(factor, shift=0.0):
    return lambda tensors, kwargs: (tuple(t * factor + shift for t in tensors), kwargs)


def raw():
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(4, 9, generator=g) for _ in range(4)]
    labels, options = torch.tensor([0, 3, -100, 8]), Options(2.0, 2.0, 0.5)
    op = torch.ops.kdfast.kd_kl_exits.default
    return [
        (op, (logits[:2], logits[2:], labels, *options, 0.25, True)),
        (op, (logits[:2], logits[2:], None, *options._replace(alpha=0.0), 0.25, False)),
        (op, ([x.bfloat16() for x in logits[:2]], [x.bfloat16() for x in logits[2:]], labels, *options, 1.0, True)),
    ]


class TestKdKlExits(Laws):
    op = LawfulOp(
        name="kd_kl_exits",
        call=call,
        truth=truth,
        eager=eager,
        inputs=inputs,
        variants=VARIANTS,
        shapes={"one vector, padded": (6, 10), "ragged": (7, 100), "in place": (5, 300)},
        small=(3, 5),
        raw=raw,
        draw=st.tuples(
            st.tuples(st.integers(0, 6), st.integers(1, 70)),
            st.fixed_dictionaries(
                {
                    "exits": st.integers(1, 4),
                    "hard": st.booleans(),
                    "alpha": st.sampled_from([0.0, 0.3, 1.0]),
                    "student_temperature": st.sampled_from([1.0, 3.0, 4.0]),
                    "label_smoothing": st.sampled_from([0.0, 0.1]),
                    "divergence": st.sampled_from(list(DIVERGENCES)),
                    "scale": st.sampled_from(["tau2", "none"]),
                    "reduction": st.sampled_from(["batchmean", "sum"]),
                }
            ),
        ),
        extremes={
            "huge spread": (scaled(300.0), 6000),
            "far from zero": (scaled(1.0, 1e4), 20),
            "tiny spread": (scaled(1e-3), 0.02),
        },
    )


def batch(exits=3, rows=4, classes=6):
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(rows, classes, generator=generator) for _ in range(2 * exits)]
    return [x.requires_grad_() for x in logits[:exits]], logits[exits:], torch.arange(rows) % classes


def test_is_kd_loss_of_each_exit():
    students, teachers, labels = batch()
    losses = exits_kd_loss(students, teachers, labels, alpha=0.3, student_temperature=2.0)
    each = [kd_loss(s, t, labels, alpha=0.3, student_temperature=2.0) for s, t in zip(students, teachers, strict=True)]
    torch.testing.assert_close(losses, torch.stack(each))
    weights = torch.tensor([1.0, 0.5, -2.0])
    ours, theirs = (torch.autograd.grad((weights * x).sum(), students) for x in (losses, torch.stack(each)))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_only_what_learns_has_a_gradient():
    students, teachers, labels = batch()
    students[1] = students[1].detach()
    teachers[2].requires_grad_()
    exits_kd_loss(students, teachers, labels).sum().backward()
    assert students[0].grad is not None and students[1].grad is None and teachers[2].grad is not None
    assert teachers[0].grad is None


def test_a_compiled_call_is_one_graph():
    students, teachers, labels = batch()
    compiled = torch.compile(lambda s, t: exits_kd_loss(s, t, labels).sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(students, teachers), exits_kd_loss(students, teachers, labels).sum())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s, t, y: (s, t[:2], y), ValueError, "must be as many, at least one, got 3 and 2"),
        (lambda s, t, y: ([], [], y), ValueError, "at least one, got 0 and 0"),
        (lambda s, t, y: ([*s[:2], s[2][:, :5]], [*t[:2], t[2][:, :5]], y), ValueError, "of one shape"),
        (lambda s, t, y: (s, t, torch.rand(4, 6)), TypeError, "must be class indices"),
        (lambda s, t, y: (s, t, y + 6), ValueError, r"labels must be in \[0, 6\)"),
        (lambda s, t, y: (s, [*t[:2], t[2] * torch.nan], y), ValueError, "teacher_logits hold NaN"),
        (lambda s, t, y: (s, [None, *t[1:]], y), TypeError, "must be a tensor"),
    ],
)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        exits_kd_loss(*change(*batch()))


def test_wrong_options():
    students, teachers, labels = batch()
    for options, message in (
        ({"divergence": "jsd"}, "divergence must be one of"),
        ({"reduction": "none"}, "reduction must be one of"),
        ({"student_temperature": 0.0}, "student_temperature must be positive"),
        ({"alpha": 2.0}, r"alpha must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            exits_kd_loss(students, teachers, labels, **options)

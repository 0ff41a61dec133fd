"""Bad input to kd_loss and its drop-ins: one clear sentence each, by its text, and nothing is lost."""

import pytest
import torch

from kdfast import generalized_jsd_loss, kd_loss

S, T = torch.randn(4, 5), torch.randn(4, 5)
LABELS = torch.tensor([0, 1, 2, 4])


def nan_in_row_two():
    teacher = T.clone()
    teacher[2, 1] = torch.nan
    return teacher


CASES = {
    "shapes": (
        ValueError,
        r"student_logits and teacher_logits must have the same shape \[\.\.\., classes\], got \[4, 5\] and \[4, 6\]; "
        r"select or project the classes they share first\.",
        lambda: kd_loss(S, torch.randn(4, 6)),
    ),
    "integer logits": (
        TypeError,
        r"student_logits must be floating point logits, got torch\.int64; call \.float\(\) on them first\.",
        lambda: kd_loss(S.long(), T),
    ),
    "not a tensor": (
        TypeError,
        r"teacher_logits must be a tensor \[\.\.\., classes\], got list\.",
        lambda: kd_loss(S, [1.0]),
    ),
    "no classes": (
        ValueError,
        r"student_logits must be \[\.\.\., classes\] with at least one class, got \[4, 0\]\.",
        lambda: kd_loss(torch.zeros(4, 0), torch.zeros(4, 0)),
    ),
    "mixed devices": (
        ValueError,
        r"student_logits and teacher_logits must be on one device, got cpu and meta; move one with \.to\(device\)\.",
        lambda: kd_loss(S, T.to("meta")),
    ),
    "labels on another device": (
        ValueError,
        r"labels must be on the logits' device cpu, got meta; move them with \.to\(device\)\.",
        lambda: kd_loss(S, T, LABELS.to("meta")),
    ),
    "labels out of range": (
        ValueError,
        r"labels must be in \[0, 5\) or ignore_index \(-100\), got 5\.",
        lambda: kd_loss(S, T, LABELS + 1),
    ),
    "negative label": (
        ValueError,
        r"labels must be in \[0, 5\) or ignore_index \(-100\), got -1\.",
        lambda: kd_loss(S, T, LABELS - 1, reduction="none"),
    ),
    "labels' shape": (
        ValueError,
        r"labels given as class indices must be \[4\], got \[3\]\.",
        lambda: kd_loss(S, T, LABELS[:3]),
    ),
    "probabilities' shape": (
        ValueError,
        r"labels given as probabilities must have the logits' shape \[4, 5\], got \[4\]; class indices are "
        r"integers: pass labels\.long\(\)\.",
        lambda: kd_loss(S, T, torch.rand(4)),
    ),
    "one-hot integers": (
        ValueError,
        r"labels given as class indices must be \[4\], got \[4, 5\]; one-hot labels are probabilities: pass "
        r"labels\.float\(\)\.",
        lambda: kd_loss(S, T, torch.nn.functional.one_hot(LABELS, 5)),
    ),
    "classes in cross_entropy's place": (
        ValueError,
        r"labels given as class indices must be \[2, 5, 4\], got \[2, 4, 3\]; classes come last here: pass "
        r"student_logits\.movedim\(1, -1\), the teacher's likewise\.",
        lambda: kd_loss(torch.rand(2, 5, 4, 3), torch.rand(2, 5, 4, 3), torch.zeros(2, 4, 3, dtype=torch.long)),
    ),
    "temperature by its place elsewhere": (
        TypeError,
        r"labels must be a tensor of class indices or probabilities, got float; temperatures go by name: "
        r"student_temperature=4\.0\.",
        lambda: kd_loss(S, T, 4.0),
    ),
    "labels with gradient": (
        ValueError,
        r"labels have no gradient here; pass labels\.detach\(\), or learn them as teacher_logits\.",
        lambda: kd_loss(S, T, torch.rand(4, 5, requires_grad=True)),
    ),
    "boolean labels": (
        TypeError,
        r"labels must be integer class indices or floating point probabilities, got torch\.bool\.",
        lambda: kd_loss(S, T, LABELS > 0),
    ),
    "tau zero": (
        ValueError,
        r"student_temperature must be positive and finite, got 0\.",
        lambda: kd_loss(S, T, student_temperature=0),
    ),
    "tau negative tensor": (
        ValueError,
        r"teacher_temperature must be positive, got a smallest value of -1\.0\.",
        lambda: kd_loss(S, T, teacher_temperature=torch.tensor(-1.0)),
    ),
    "tau NaN": (
        ValueError,
        r"student_temperature must be positive and finite, got nan\.",
        lambda: kd_loss(S, T, student_temperature=float("nan")),
    ),
    "tau's shape": (
        ValueError,
        r"student_temperature must hold one value or one a row \[4\], got \[3\]\.",
        lambda: kd_loss(S, T, student_temperature=torch.ones(3)),
    ),
    "tau a string": (
        TypeError,
        r"student_temperature must be a positive number or a tensor, got str\.",
        lambda: kd_loss(S, T, student_temperature="4"),
    ),
    "alpha": (ValueError, r"alpha must be in \[0, 1\], got 1\.5\.", lambda: kd_loss(S, T, LABELS, alpha=1.5)),
    "alpha a tensor": (
        TypeError,
        r"alpha must be a number in \[0, 1\], got Tensor\.",
        lambda: kd_loss(S, T, LABELS, alpha=torch.tensor(0.5)),
    ),
    "label smoothing": (
        ValueError,
        r"label_smoothing must be in \[0, 1\], got -0\.1\.",
        lambda: kd_loss(S, T, LABELS, label_smoothing=-0.1),
    ),
    "divergence": (
        ValueError,
        r"divergence must be one of 'forward_kl', 'reverse_kl', 'soft_ce', 'jsd', 'dkd', got 'kl'\.",
        lambda: kd_loss(S, T, divergence="kl"),
    ),
    "scale": (
        ValueError,
        r"scale must be one of 'tau2', 'product', 'none', got None\.",
        lambda: kd_loss(S, T, scale=None),
    ),
    "reduction": (
        ValueError,
        r"reduction must be one of 'none', 'sum', 'mean', 'batchmean', got 'avg'\.",
        lambda: kd_loss(S, T, reduction="avg"),
    ),
    "weight": (
        ValueError,
        r"weight must hold one value a row \[4\], got \[5\]\.",
        lambda: kd_loss(S, T, weight=torch.ones(5)),
    ),
    "beta for a KL": (
        ValueError,
        r"beta belongs to divergence='jsd' and 'dkd', got divergence='forward_kl'; leave it out\.",
        lambda: kd_loss(S, T, beta=0.5),
    ),
    "beta at its end": (
        ValueError,
        r"beta must lie strictly between 0 and 1 for divergence='jsd', got 1; at its ends use 'forward_kl' \(0\) or "
        r"'reverse_kl' \(1\)\.",
        lambda: kd_loss(S, T, divergence="jsd", beta=1),
    ),
    "beta negative": (
        ValueError,
        r"beta must be at least 0 and finite, got -1\.0\.",
        lambda: kd_loss(S, T, LABELS, divergence="dkd", beta=-1.0),
    ),
    "beta a tensor": (
        TypeError,
        r"beta must be a number, got Tensor\.",
        lambda: kd_loss(S, T, divergence="jsd", beta=torch.tensor(0.5)),
    ),
    "target weight for a KL": (
        ValueError,
        r"target_weight belongs to divergence='dkd', got divergence='jsd'; leave it out\.",
        lambda: kd_loss(S, T, divergence="jsd", target_weight=2.0),
    ),
    "dkd without labels": (
        ValueError,
        r"divergence='dkd' needs labels as class indices \[4\], for alpha=0 too, got none\.",
        lambda: kd_loss(S, T, divergence="dkd"),
    ),
    "dkd on probabilities": (
        ValueError,
        r"divergence='dkd' needs labels as class indices \[4\], for alpha=0 too, got probabilities; pass "
        r"labels\.argmax\(-1\)\.",
        lambda: kd_loss(S, T, T.softmax(-1), divergence="dkd"),
    ),
    "dkd's labels out of range": (
        ValueError,
        r"labels must be in \[0, 5\) or ignore_index \(-100\), got 5\.",
        lambda: kd_loss(S, T, LABELS + 1, divergence="dkd", alpha=0.0),
    ),
    "softcap": (ValueError, r"softcap must be positive and finite, got 0\.", lambda: kd_loss(S, T, softcap=0)),
    "softcap a tensor": (
        TypeError,
        r"softcap must be a positive number, got Tensor\.",
        lambda: kd_loss(S, T, softcap=torch.tensor(30.0)),
    ),
    "logit scale": (
        ValueError,
        r"logit_scale must be positive and finite, got -1\.",
        lambda: kd_loss(S, T, logit_scale=-1),
    ),
    "jsd's rows have no matrix": (
        ValueError,
        r"reduction must be one of 'batchmean', 'mean', 'sum', got 'none'\.",
        lambda: generalized_jsd_loss(S, T, reduction="none"),
    ),
    "jsd's labels": (
        TypeError,
        r"labels must be a tensor of class indices, got torch\.float32\.",
        lambda: generalized_jsd_loss(S, T, T.softmax(-1)),
    ),
    "NaN teacher": (
        ValueError,
        r"teacher_logits hold NaN \(first in row 2\); check the teacher's weights, its inputs, or its half-precision "
        r"range\.",
        lambda: kd_loss(S, nan_in_row_two()),
    ),
    "NaN teacher, row losses": (
        ValueError,
        r"teacher_logits hold NaN \(first in row 2\)",
        lambda: kd_loss(S, nan_in_row_two(), LABELS, reduction="none"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_sentence(case):
    kind, text, call = CASES[case]
    with pytest.raises(kind, match=f"^{text}"):
        call()


def test_a_diverged_student_is_the_users_to_see():
    """NaN in the student is training gone wrong, not bad input: the loss is NaN, as PyTorch's would be."""
    student = S.clone()
    student[0, 0] = torch.nan
    assert kd_loss(student, T).isnan()


def test_nothing_is_lost():
    student = S.clone().requires_grad_()
    with pytest.raises(ValueError, match="labels must be in"):
        kd_loss(student, T, LABELS + 3)
    assert student.grad is None
    kd_loss(student, T, LABELS).backward()
    assert student.grad.isfinite().all()

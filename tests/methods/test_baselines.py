"""The baselines' losses against their formulas, and what every distiller promises of its teacher."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdfast.methods import KD, MKD, Alone, DistPro


def test_alone_is_cross_entropy(task):
    distiller = Alone(task.student())
    inputs, targets = task.data(8)
    outputs = distiller.student_outputs(inputs)
    parts = distiller.losses(outputs, distiller.teacher_outputs(inputs), targets)
    assert list(parts) == ["task"]
    torch.testing.assert_close(parts["task"], F.cross_entropy(outputs, targets))
    assert distiller.export() is distiller.student
    assert list(distiller.meta_parameters()) == []


def test_kd_is_hintons_loss(task):
    distiller = KD(task.student(), task.teacher(), alpha=0.3, temperature=2.0)
    inputs, targets = task.data(8)
    outputs, teacher_outputs = distiller.student_outputs(inputs), distiller.teacher_outputs(inputs)
    soft = F.kl_div(
        F.log_softmax(outputs / 2, 1), F.log_softmax(teacher_outputs / 2, 1), log_target=True, reduction="batchmean"
    )
    expected = 0.3 * F.cross_entropy(outputs, targets) + 0.7 * 4 * soft
    torch.testing.assert_close(distiller.losses(outputs, teacher_outputs, targets)["kd"], expected)


def test_teacher_stays_frozen_and_out_of_the_state(task):
    teacher = task.teacher()
    distiller = KD(task.student(), teacher).double().train()
    assert not teacher.training
    assert next(teacher.parameters()).dtype == torch.float64
    assert not any(p.requires_grad for p in teacher.parameters())
    mine = {id(p) for p in distiller.parameters()}
    assert not any(id(p) in mine for p in teacher.parameters())
    assert all(key.startswith("student.") for key in distiller.state_dict())


def squared(logits, targets):
    """A task loss that is no classification's, of targets that are no labels."""
    return (logits - targets).square().mean()


@pytest.mark.parametrize(
    ("method", "options", "share"),
    [(Alone, {}, 1.0), (KD, {"alpha": 0.3}, 0.3), (MKD, {"alpha": 0.3}, 0.3), (DistPro, {}, 1.0)],
)
def test_the_task_loss_may_be_any(method, options, share, task):
    networks = [task.student()] if method is Alone else [task.student(), task.teacher()]
    distiller = method(*networks, task_loss=squared, **options)
    inputs, targets = task.data(8)[0], torch.randn(8, 4)
    outputs = distiller.student_outputs(inputs)
    expected = squared(distiller.logits(outputs), targets)
    parts = distiller.losses(outputs, distiller.teacher_outputs(inputs), targets)
    torch.testing.assert_close(parts["task"], share * expected)
    torch.testing.assert_close(distiller.validation_loss(outputs, targets), expected)
    distiller = method(*networks, validation_loss=lambda logits, targets: logits.sum() * targets)
    torch.testing.assert_close(distiller.validation_loss(outputs, 3), 3 * distiller.logits(outputs).sum())


def test_kd_weighs_any_task_loss_like_cross_entropy(task):
    """The fused sweep and the two terms apart are the same numbers."""
    student, teacher = task.student(), task.teacher()
    inputs, targets = task.data(8)
    sums = []
    for task_loss in (F.cross_entropy, nn.CrossEntropyLoss()):
        distiller = KD(student, teacher, alpha=0.3, task_loss=task_loss)
        parts = distiller.losses(distiller.student_outputs(inputs), distiller.teacher_outputs(inputs), targets)
        sums.append(sum(parts.values()))
    torch.testing.assert_close(sums[0], sums[1])


def test_a_loss_must_be_a_function():
    with pytest.raises(TypeError, match=r"task_loss must be a function of \(logits, targets\), got str"):
        Alone(nn.Identity(), task_loss="ce")
    with pytest.raises(TypeError, match=r"validation_loss must be a function of \(logits, targets\), got int"):
        Alone(nn.Identity(), validation_loss=0)

"""The baselines' losses against their formulas, and what every distiller promises of its teacher."""

import torch
from torch.nn import functional as F

from kdfast.methods import KD, Alone


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

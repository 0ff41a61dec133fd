"""DML, ONE and born-again networks against plain formulas."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdfast.methods import DML, ONE, BornAgain
from kdfast.models import CifarResNet
from kdfast.train.loop import ordinary_step
from tests.methods.test_stagewise import parts_of


class Parted(CifarResNet):
    def parts(self):
        return parts_of(self)


def parted():
    return Parted(8, (4, 6, 8), in_channels=1, classes=4)


def kl(target, z, tau=1.0):
    p = (target / tau).softmax(1)
    return tau**2 * (p * (p.log() - (z / tau).log_softmax(1))).sum(1).mean()


def test_dml_teaches_both_and_neither_through_the_other(task):
    distiller = DML(task.student(), parted()).double()
    inputs, targets = task.data(6)
    a, b = outputs = distiller.student_outputs(inputs.double())
    parts = distiller.losses(outputs, distiller.teacher_outputs(inputs), targets)
    torch.testing.assert_close(parts["task"], F.cross_entropy(a, targets))
    torch.testing.assert_close(parts["peer_task"], F.cross_entropy(b, targets))
    torch.testing.assert_close(parts["mutual"], kl(b, a))
    torch.testing.assert_close(parts["peer_mutual"], kl(a, b))
    assert torch.autograd.grad(parts["mutual"], b, allow_unused=True, retain_graph=True) == (None,)
    sum(parts.values()).backward()
    assert all(p.grad is not None for p in distiller.inner_parameters())
    distiller.eval()
    assert torch.equal(distiller.student_outputs(inputs.double()), distiller.student(inputs.double()))
    assert distiller.export() is distiller.student
    with pytest.raises(ValueError, match="peer must be a network of its own"):
        DML(distiller.student, distiller.student)


def test_one_is_the_gated_ensemble_and_its_lessons(task):
    distiller = ONE(parted(), branches=3).double()
    inputs, targets = task.data(6)
    outputs = distiller.student_outputs(inputs.double())
    logits, gate = outputs
    torch.testing.assert_close(gate.sum(1), torch.ones(6, dtype=torch.float64))
    ensemble = sum(gate[:, i : i + 1] * z for i, z in enumerate(logits))
    parts = distiller.losses(outputs, None, targets)
    torch.testing.assert_close(parts["task"], F.cross_entropy(ensemble, targets))
    torch.testing.assert_close(parts["branches"], sum(F.cross_entropy(z, targets) for z in logits))
    torch.testing.assert_close(parts["kd"], sum(kl(ensemble, z, 3.0) for z in logits))
    assert torch.autograd.grad(parts["kd"], gate, allow_unused=True, retain_graph=True) == (None,)
    assert not any(torch.allclose(logits[0], z) for z in logits[1:])  # branches begin apart
    sum(parts.values()).backward()
    assert all(p.grad is not None for p in distiller.inner_parameters())
    twin = copy.deepcopy(distiller.student).train()
    torch.testing.assert_close(distiller.logits(outputs), twin(inputs.double()))
    parted().double().load_state_dict(distiller.export().state_dict())


def test_one_learns(task):
    torch.manual_seed(0)
    distiller = ONE(parted())
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.02, momentum=0.9)
    losses = [ordinary_step(distiller, task.data(32), optimizer) for _ in range(20)]
    assert torch.stack(losses[-5:]).mean() < 0.8 * torch.stack(losses[:5]).mean()


def test_one_errors():
    with pytest.raises(ValueError, match=r"ONE needs a student with a method parts\(\)"):
        ONE(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"branches must be at least 2, .* got 1"):
        ONE(parted(), branches=1)


def test_born_again_learns_from_labels_and_probabilities(task):
    distiller = BornAgain(task.student(), task.teacher()).double()
    inputs, targets = task.data(6)
    outputs, taught = distiller.student_outputs(inputs.double()), distiller.teacher_outputs(inputs.double())
    parts = distiller.losses(outputs, taught, targets)
    torch.testing.assert_close(parts["kd"], -(taught.softmax(1) * outputs.log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(parts["task"], F.cross_entropy(outputs, targets))
    third = distiller.reborn(task.student())
    assert third.teacher is distiller.student
    assert not third.teacher.training
    assert not any(p.requires_grad for p in third.teacher.parameters())

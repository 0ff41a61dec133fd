"""MKD: its temperatures, its losses, and a small training end to end."""

import pytest
import torch
from torch.nn import functional as F

from kdfast.meta import meta_kd_step
from kdfast.methods import MKD, Temperatures, incorrect_brier


def test_loss_is_soft_cross_entropy_without_scale_or_labels(task):
    distiller = MKD(task.student(), task.teacher(), initial_temperature=2.0)
    inputs, targets = task.data(8)
    outputs, teacher_outputs = distiller.student_outputs(inputs), distiller.teacher_outputs(inputs)
    expected = -(F.softmax(teacher_outputs / 2, 1) * F.log_softmax(outputs / 2, 1)).sum(1).mean()
    torch.testing.assert_close(distiller.losses(outputs, teacher_outputs, targets)["kd"], expected)
    distiller.alpha = 0.25
    expected = 0.75 * expected + 0.25 * F.cross_entropy(outputs, targets)
    torch.testing.assert_close(distiller.losses(outputs, teacher_outputs, targets)["kd"], expected)


@pytest.mark.parametrize("mlp", [True, False])
@pytest.mark.parametrize("learn", ["both", "student", "teacher", "shared"])
def test_temperatures_start_at_their_initial_value_and_move_as_asked(learn, mlp):
    temperatures = Temperatures(initial=3.0, span=2.0, learn=learn, mlp=mlp)
    tau_s, tau_t = temperatures()
    assert tau_s.item() == tau_t.item() == 3.0
    optimizer = torch.optim.SGD(temperatures.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        tau_s, tau_t = temperatures()
        (tau_s - 2 * tau_t).backward()
        optimizer.step()
    tau_s, tau_t = (x.item() for x in temperatures())
    if learn == "both":
        assert tau_s < 3 < tau_t
    elif learn == "shared":
        assert tau_s == tau_t > 3
    else:
        assert (tau_s < 3 and tau_t == 3) if learn == "student" else (tau_s == 3 and tau_t > 3)


def test_temperatures_stay_in_their_span():
    temperatures = Temperatures(initial=3.0, span=2.0, mlp=False)
    temperatures.code.data = torch.tensor([100.0, -100.0])
    assert [x.item() for x in temperatures()] == pytest.approx([4.0, 2.0])


def test_mlp_has_the_papers_sizes():
    shapes = [tuple(p.shape) for p in Temperatures().parameters()]
    assert sorted(shapes) == sorted([(8,), (16, 8), (16,), (2, 16), (2,)])


def test_incorrect_brier_counts_the_wrong_samples_only():
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 0.0]])
    p = torch.sigmoid(torch.tensor(3.0))
    # the first is right; the second wrong by p in both classes; equal logits count as the first class: right
    expected = 2 * p**2 / 3
    torch.testing.assert_close(incorrect_brier(logits, torch.tensor([0, 1, 0])), expected)
    one_hot = F.one_hot(torch.tensor([0, 1, 0])).float()
    torch.testing.assert_close(incorrect_brier(logits, one_hot), expected)
    assert incorrect_brier(logits, torch.tensor([0, 0, 0])) == 0


class Token(torch.nn.Module):
    """Two heads on one linear layer; in eval mode their mean, as timm's distilled transformers have it."""

    def __init__(self):
        super().__init__()
        self.heads = torch.nn.ModuleList([torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)])

    def forward(self, x):
        both = tuple(head(x) for head in self.heads)
        return both if self.training else (both[0] + both[1]) / 2


def test_distillation_token_learns_from_the_teacher_and_the_class_token_from_labels():
    student, inputs, targets = Token(), torch.randn(8, 6), torch.randint(4, (8,))
    distiller = MKD(student, torch.nn.Linear(6, 4), distillation_token=True, alpha=0.25)
    outputs, taught = distiller.student_outputs(inputs), distiller.teacher_outputs(inputs)
    parts = distiller.losses(outputs, taught, targets)
    soft = -(F.softmax(taught.double() / 3, 1) * F.log_softmax(outputs[1].double() / 3, 1)).sum(1).mean()
    torch.testing.assert_close(parts["kd"].double(), 0.75 * soft)
    torch.testing.assert_close(parts["task"], 0.25 * F.cross_entropy(outputs[0], targets))
    assert torch.autograd.grad(parts["kd"], student.heads[0].weight, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(parts["task"], student.heads[1].weight, allow_unused=True) == (None,)
    torch.testing.assert_close(distiller.logits(outputs), (outputs[0] + outputs[1]) / 2)
    torch.testing.assert_close(
        distiller.logits(distiller.eval().student_outputs(inputs)), (outputs[0] + outputs[1]) / 2
    )
    with pytest.raises(ValueError, match=r"must return \(class logits, distillation logits\) in training, got Tensor"):
        distiller.losses(distiller.student_outputs(inputs), taught, targets)
    with pytest.raises(ValueError, match=r"alpha must be above 0 with a distillation token"):
        MKD(student, torch.nn.Linear(6, 4), distillation_token=True, alpha=0.0)


def test_extra_losses_join_the_train_loss_and_train_with_the_student(task):
    class Hint(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, outputs, teacher_outputs, targets):
            return {"hint": self.scale * (outputs[1][0].mean() - teacher_outputs[1][0].mean()) * targets[1].sum()}

    distiller = MKD(task.student(), task.teacher(), features=True, extra_losses=Hint(), alpha=0.5)
    inputs, labels = task.data(8)
    indices = torch.arange(8)
    outputs, taught = distiller.student_outputs(inputs), distiller.teacher_outputs(inputs)
    parts = distiller.losses(outputs, taught, (labels, indices))
    torch.testing.assert_close(parts["hint"], 2 * (outputs[1][0].mean() - taught[1][0].mean()) * 28)
    plain = MKD(distiller.student, task.teacher(), alpha=0.5).losses(outputs[0], taught[0], labels)["kd"]
    torch.testing.assert_close(parts["kd"], plain)
    assert id(distiller.extra_losses.scale) in {id(p) for p in distiller.inner_parameters()}
    torch.testing.assert_close(
        distiller.validation_loss(outputs, (labels, indices)), F.cross_entropy(outputs[0], labels)
    )
    distiller = MKD(task.student(), task.teacher(), extra_losses=lambda *_: {"kd": torch.ones(())})
    with pytest.raises(ValueError, match="extra_losses must name parts other than kd, got kd"):
        distiller.losses(outputs[0], taught[0], labels)


def test_meta_learning_in_the_last_epochs_only():
    distiller = MKD(torch.nn.Identity(), torch.nn.Identity(), meta_last_epochs=2)
    active = []
    for epoch in range(5):
        distiller.start_epoch(epoch, 5)
        active.append(distiller.meta_active)
    assert active == [False, False, False, True, True]
    assert MKD(torch.nn.Identity(), torch.nn.Identity()).meta_active
    with pytest.raises(ValueError, match="meta_last_epochs must be at least 1, or None for all epochs, got 0"):
        MKD(torch.nn.Identity(), torch.nn.Identity(), meta_last_epochs=0)


def test_errors():
    with pytest.raises(ValueError, match=r"learn must be one of 'both', 'student', 'teacher', 'shared', got 'none'"):
        Temperatures(learn="none")
    with pytest.raises(ValueError, match=r"span must be in \(0, 2 \* initial\).*got span 2.0 and initial 1.0"):
        Temperatures(initial=1.0, span=2.0)
    with pytest.raises(ValueError, match=r"meta_objective must be one of 'ce', 'incorrect_brier', got 'mse'"):
        MKD(torch.nn.Identity(), torch.nn.Identity(), meta_objective="mse")


@pytest.mark.parametrize("meta_objective", ["ce", "incorrect_brier"])
def test_training_end_to_end(meta_objective, task):
    distiller = MKD(task.student(), task.teacher(), meta_objective=meta_objective, span=4.0)
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1, momentum=0.9)
    meta_optimizer = torch.optim.AdamW(distiller.meta_parameters(), lr=0.005)
    validation = task.data(64)

    def evaluate():
        with torch.no_grad():
            return distiller.validation_loss(distiller.student_outputs(validation[0]), validation[1])

    before, start = evaluate(), [x.item() for x in distiller.temperatures()]
    for _ in range(40):
        report = meta_kd_step(distiller, task.data(32), task.data(32), optimizer, meta_optimizer)
        assert report.validation_loss.isfinite()
        assert distiller.temperatures()[0].isfinite()
    assert evaluate() < 0.7 * before
    end = [x.item() for x in distiller.temperatures()]
    assert all(abs(a - b) > 0.05 and 1 < b < 5 for a, b in zip(start, end, strict=True))
    # soft cross-entropy has its gradient scaled by 1 / tau_s: an untrained student is helped by a small one
    assert end[0] < start[0]

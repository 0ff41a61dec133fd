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

import copy

import pytest
import torch
from torch import nn

from kdfast.meta import MetaKD
from kdfast.methods.base import Distiller
from kdfast.train.history import StepRecord
from kdfast.train.loop import accuracy, ordinary_step, repeated_warmup_cosine, step_decay, warmup_cosine
from kdfast.train.trainer import Trainer


class Plain(Distiller):
    def losses(self, outputs, teacher_outputs, targets):
        return {"ce": nn.functional.cross_entropy(outputs, targets)}


class Weighted(Distiller):
    """Imitates the teacher with a learned weight, so that there is one meta-parameter."""

    def __init__(self, student, teacher):
        super().__init__(student, teacher)
        self.weight = nn.Parameter(torch.tensor(0.5))

    def losses(self, outputs, teacher_outputs, targets):
        imitation = (outputs - teacher_outputs).square().mean()
        return {"ce": nn.functional.cross_entropy(outputs, targets), "imitation": self.weight * imitation}

    def meta_parameters(self):
        return iter([self.weight])


def fit(*arguments, **options):
    return Trainer(*arguments, **options).run()


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def problem(count=48):
    """Three separable clouds in six dimensions."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(count) % 3
    inputs = torch.randn(count, 6, generator=generator) + 2 * nn.functional.one_hot(targets, 6)
    return inputs, targets


def batches(count=48, size=16):
    inputs, targets = problem(count)
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def sgd(distiller, lr=0.1):
    return torch.optim.SGD(distiller.inner_parameters(), lr=lr, momentum=0.9)


def test_learns_and_records_every_step_and_epoch():
    torch.manual_seed(0)
    distiller = Plain(network())
    seen = []
    history = fit(distiller, batches(), sgd(distiller), epochs=8, evaluation=[problem()], callback=seen.append)
    assert history.last.accuracy > 0.9 and [record.steps for record in history.epochs] == list(range(3, 25, 3))
    assert len(seen) == 8 * 3 and history.best.accuracy == max(record.accuracy for record in history.epochs)
    assert history.epochs[0].parts["ce"] == pytest.approx(sum(record.loss for record in seen[:3]) / 3)
    assert [(r.step, r.epoch) for r in seen[:4]] == [(0, 0), (1, 0), (2, 0), (3, 1)]
    assert seen[-1].loss < 0.5 * seen[0].loss
    assert all(isinstance(r, StepRecord) and 0 < r.seconds < 5 for r in seen)
    assert distiller.training and distiller.student.training


def test_steps_are_the_ordinary_ones_and_evaluation_leaves_no_trace():
    results = []
    for evaluation in (None, [problem()]):
        torch.manual_seed(0)
        distiller = Plain(network())
        fit(distiller, batches(), sgd(distiller), epochs=3, evaluation=evaluation)
        results.append(distiller.state_dict())
    torch.manual_seed(0)
    student = network()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        for inputs, targets in batches():
            optimizer.zero_grad()
            nn.functional.cross_entropy(student(inputs), targets).backward()
            optimizer.step()
    for name, value in student.state_dict().items():
        assert torch.equal(value, results[0][f"student.{name}"]) and torch.equal(value, results[1][f"student.{name}"])


def test_evaluates_every_few_epochs_and_after_the_last():
    distiller = Plain(network())
    history = fit(distiller, batches(), sgd(distiller), epochs=5, evaluation=[problem()], evaluate_every=2)
    assert [record.steps for record in history.epochs if record.accuracy is not None] == [6, 12, 15]


@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_warmup_cosine_rises_in_a_line_and_falls_to_zero(warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = warmup_cosine(optimizer, 40, warmup)
    rates = []
    for _ in range(41):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rising = round(40 * warmup)
    assert rates[:rising] == pytest.approx([2.0 * (i + 1) / rising for i in range(rising)])
    assert max(rates) == 2.0 and rates[40] == pytest.approx(0, abs=1e-12)
    assert rates[(40 + rising) // 2] == pytest.approx(1.0)  # half way down the cosine
    assert rates[rising:] == sorted(rates[rising:], reverse=True)


def test_repeated_warmup_cosine_is_one_after_another():
    def rates(make, steps):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        scheduler, seen = make(optimizer), []
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen

    first, second = (rates(lambda o, n=n: warmup_cosine(o, n, 0.2), n) for n in (10, 15))
    assert rates(lambda o: repeated_warmup_cosine(o, [10, 15], 0.2), 25) == first + second


def test_step_decay_multiplies_at_each_milestone():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = step_decay(optimizer, [2, 3], 0.1)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1, 1, 0.1, 0.01, 0.01])


def test_scheduler_steps_once_a_step():
    distiller = Plain(network())
    optimizer = sgd(distiller, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    rates = []
    fit(
        distiller,
        batches(),
        optimizer,
        epochs=2,
        scheduler=scheduler,
        callback=lambda record: rates.append(optimizer.param_groups[0]["lr"]),
    )
    assert rates == [1 / (2 + step) for step in range(6)]


def test_meta_parameters_learn_on_validation_batches_that_start_anew():
    torch.manual_seed(0)
    bad_teacher = nn.Linear(6, 3)
    with torch.no_grad():  # it prefers the wrong classes: imitating it hurts, so its weight must fall
        bad_teacher.weight.copy_(-torch.eye(3, 6))
    distiller = Weighted(network(), bad_teacher)
    validation = batches(32, 16)  # two batches for six steps
    meta_optimizer = torch.optim.SGD(distiller.meta_parameters(), lr=0.5)
    weights = []
    fit(
        distiller,
        batches(),
        sgd(distiller),
        epochs=2,
        validation_batches=validation,
        meta_optimizer=meta_optimizer,
        callback=lambda record: weights.append(distiller.weight.item()),
    )
    assert len(set(weights)) == 6 and weights[-1] < 0.5


@pytest.mark.parametrize(
    "meta", [{}, {"every": 2}, {"validation": "rolling"}, {"tangent": "central", "commit": "separate"}]
)
def test_meta_options_are_those_of_the_engine(meta):
    distiller = Weighted(network(), nn.Linear(6, 3))
    reference = copy.deepcopy(distiller)
    meta_optimizer = torch.optim.SGD(distiller.meta_parameters(), lr=0.1)
    held_out = None if meta.get("validation") == "rolling" else batches()
    options = {"validation_batches": held_out, "meta_optimizer": meta_optimizer, "meta": meta}
    torch.manual_seed(1)
    fit(distiller, batches(), sgd(distiller), epochs=1, **options)
    torch.manual_seed(1)
    engine = MetaKD(reference, sgd(reference), torch.optim.SGD(reference.meta_parameters(), lr=0.1), **meta)
    held_out = iter(batches())
    for batch in batches():
        engine.step(batch, next(held_out) if engine.wants_validation else None)
    assert torch.equal(distiller.weight, reference.weight)
    assert distiller.weight.item() != 0.5


def test_without_meta_optimizer_meta_parameters_stay_and_gather_no_gradient():
    distiller = Weighted(network(), nn.Linear(6, 3))
    ordinary_step(distiller, batches()[0], sgd(distiller))
    assert distiller.weight.item() == 0.5 and distiller.weight.grad is None


def test_frozen_student_parameter_stays():
    distiller = Plain(network())
    optimizer = sgd(distiller)
    first = distiller.student[0].weight.requires_grad_(False)
    before = first.clone()
    ordinary_step(distiller, batches()[0], optimizer)
    assert torch.equal(first, before)


def test_accuracy_is_that_of_the_exported_student_in_eval_mode():
    class Fixed(nn.Module):
        def forward(self, x):
            assert not self.training
            return nn.functional.one_hot(x, 3).float()

    class Tupled(Plain):
        def student_outputs(self, inputs):
            raise AssertionError("what is exported is measured")

    inputs = torch.tensor([0, 1, 2, 0, 1])
    targets = torch.tensor([0, 1, 2, 2, 2])
    distiller = Tupled(Fixed())
    assert accuracy(distiller, inputs, targets, batch_size=2) == pytest.approx(3 / 5)
    assert distiller.training and distiller.student.training


def test_misuse_is_one_sentence():
    distiller = Weighted(network(), nn.Linear(6, 3))
    meta_optimizer = torch.optim.SGD(distiller.meta_parameters(), lr=0.1)
    with pytest.raises(ValueError, match="needs validation_batches beside the meta_optimizer"):
        fit(distiller, batches(), sgd(distiller), epochs=1, meta_optimizer=meta_optimizer)
    with pytest.raises(ValueError, match="validation_batches must yield at least one batch, got none"):
        fit(distiller, batches(), sgd(distiller), epochs=1, validation_batches=[], meta_optimizer=meta_optimizer)
    with pytest.raises(ValueError, match="needs at least one batch an epoch, got none"):
        fit(distiller, [], sgd(distiller), epochs=1)
    with pytest.raises(ValueError, match="evaluate needs at least one batch, got none"):
        fit(distiller, batches(), sgd(distiller), epochs=1, evaluation=[])
    meta = {"validation_batches": batches(), "meta_optimizer": meta_optimizer}
    plain = Plain(network())
    with pytest.raises(ValueError, match="Plain has no meta-parameters; leave out the meta_optimizer"):
        fit(plain, batches(), sgd(plain), epochs=1, **meta)
    for options, sentence in (
        ({"precision": "tf32"}, "precision must be one of 'fp32', 'bf16', 'fp16', got 'tf32'"),
        ({"meta": {"every": 0}, **meta}, "every must be a number of steps of at least 1, got 0"),
        ({"accumulate": 0}, "at least 1"),
        ({"ema": 1.0}, "decay in \\(0, 1\\), got 1.0"),
        ({"checkpoint_every": 1}, "needs batches with a state_dict"),
    ):
        with pytest.raises(ValueError, match=sentence):
            fit(distiller, batches(), sgd(distiller), epochs=1, **options)

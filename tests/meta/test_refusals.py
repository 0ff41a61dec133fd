"""What a student or a head does that a meta-step cannot follow is said; what changes between steps is followed."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from kdfast.meta import MetaKD, meta_kd_step
from tests.meta.students import Head, Net, batch, optimizers, plain_step


# ---------------------------------------------------------------- what it computes with
class Autocast(Net):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = super().forward(x)
        return tuple(x.float() for x in outputs)


@pytest.mark.parametrize("student", [Autocast, lambda: Net().bfloat16()])
def test_sixteen_bits_inside_the_student_are_seen(student):
    distiller = Head(student())
    dtype = distiller.student.conv1.weight.dtype
    step = lambda **options: meta_kd_step(  # noqa: E731
        distiller, batch(dtype=dtype), batch(dtype=dtype), *optimizers(distiller), **options
    )
    assert step().tangent_error < 0.5  # at a displacement of single precision there is nothing but rounding
    with pytest.raises(ValueError, match="no accurate default displacement in bfloat16"):
        step(tangent="forward")


def test_no_accurate_displacement_is_said_before_anything_runs():
    distiller = Head(Net())
    before = copy.deepcopy(distiller.state_dict())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="no accurate default displacement"):
        meta_kd_step(distiller, batch(), batch(), *optimizers(distiller), tangent="forward")
    assert all(torch.equal(x, before[k]) for k, x in distiller.state_dict().items())


# ---------------------------------------------------------------- what cannot be
def step_of(distiller, dtype=torch.float32):
    return meta_kd_step(distiller, batch(dtype=dtype), batch(dtype=dtype), *optimizers(distiller))


def test_outputs_out_of_sight_are_refused():
    class Bag:
        def __init__(self, logits, feature):
            self.logits, self.feature = logits, feature

    class Bagged(Head):
        def student_outputs(self, inputs):
            return Bag(*self.student(inputs))

        def losses(self, outputs, teacher_outputs, targets):
            return super().losses((outputs.logits, outputs.feature), teacher_outputs, targets)

    with pytest.raises(TypeError, match=r"tuples, lists and dicts, got a Bag with the tensor 'logits' in it"):
        step_of(Bagged(Net()))


def test_writing_to_inputs_or_outputs_is_refused():
    class Normalising(Net):
        def forward(self, x):
            return super().forward(x.sub_(0.5).div_(0.25))

    class Cooling(Head):
        def losses(self, outputs, teacher_outputs, targets):
            outputs[0].div_(2)
            return super().losses(outputs, teacher_outputs, targets)

    with pytest.raises(ValueError, match=r"The student writes to its inputs in place, .* work on a copy"):
        step_of(Head(Normalising()))
    with pytest.raises(ValueError, match=r"The head writes to its outputs, teacher outputs or targets in place"):
        step_of(Cooling(Net()))


def test_sparse_gradients_are_refused():
    class Embedded(Net):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(4, 6, sparse=True)

        def first(self, x):
            return super().first(x) + self.embedding(x[:, 0, 0, 0].abs().long().clamp(max=3))[:, :, None, None]

    with pytest.raises(ValueError, match=r"needs dense gradients, got a sparse one; .* sparse=False"):
        step_of(Head(Embedded()))


# ---------------------------------------------------------------- what changes on the way
def test_parameters_frozen_and_thawed_between_steps():
    torch.manual_seed(0)
    distiller = Head(Net())
    ordinary = copy.deepcopy(distiller)
    for d in (distiller, ordinary):
        d.student.conv1.requires_grad_(False)
    optimizer, other = (SGD(d.inner_parameters(), lr=0.1) for d in (distiller, ordinary))
    engine = MetaKD(distiller, optimizer, SGD(distiller.meta_parameters(), lr=0.0), validation="rolling")
    for module, trains in (("conv1", False), ("conv1", True), ("conv2", False), ("conv2", True)):
        for d in (distiller, ordinary):
            getattr(d.student, module).requires_grad_(trains)
        for train in (batch(dtype=torch.float32), batch(dtype=torch.float32)):
            report = engine.step(train)
            plain_step(ordinary, train, other)
        assert not report.skipped
        result, expected = distiller.state_dict(), ordinary.state_dict()
        assert [k for k in expected if not torch.equal(result[k], expected[k])] == []


@pytest.mark.parametrize("tangent", ["forward", "jvp", "exact"])
def test_meta_parameters_without_effect_are_skipped(tangent):
    class Deaf(Head):
        def losses(self, outputs, teacher_outputs, targets):
            return {"task": F.cross_entropy(outputs[0], targets)}

    distiller = Deaf(Net())
    before = distiller.phi.detach().clone()
    meta_optimizer = torch.optim.AdamW(distiller.meta_parameters(), lr=0.1, weight_decay=0.5)
    engine = MetaKD(distiller, optimizers(distiller)[0], meta_optimizer, tangent=tangent)
    report = engine.step(batch(dtype=torch.float32), batch(dtype=torch.float32))
    assert report.skipped and engine.skipped == 1
    assert torch.equal(distiller.phi, before)

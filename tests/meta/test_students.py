"""Students of all sorts: what they compute with, share, detach and run again, against double backward in fp64."""

import copy

import pytest
import torch
import torch.nn.utils.parametrizations as parametrizations
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kdfast.meta import MetaKD, exact_hypergradient
from tests.meta.students import Head, Net, batch, optimizers, plain_step, reference
from tests.meta.test_hypergradient import assert_close, flat
from tests.meta.test_step import everything

ORDERS = {
    "reuse": {}, "rehead": {"commit": "rehead"}, "separate": {"commit": "separate"},
    "rolling": {"validation": "rolling"},
}  # fmt: skip


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def agrees(student, tangents=("forward", "central", "jvp"), head=Head):
    """The meta-gradient of a first step by each tangent, and what `exact_hypergradient` says, are the reference's."""
    torch.manual_seed(0)
    distiller = head(student).double()
    train, validation = batch(), batch()
    plain_step(distiller, train, optimizers(distiller)[0])
    expected = reference(distiller, train, validation)
    assert expected.norm() > 0
    torch.testing.assert_close(
        flat(exact_hypergradient(distiller, train, validation, optimizers(distiller)[0])), expected
    )
    for tangent in tangents:
        for order, options in ORDERS.items():
            made = copy.deepcopy(distiller)
            engine = MetaKD(made, *optimizers(made), tangent=tangent, **options)
            if order == "rolling":
                engine.step(train)
                report = engine.step(validation)
            else:
                report = engine.step(train, validation)
            assert_close(made.phi.grad, expected)
            assert report.tangent_error < 1e-3, (tangent, order)
            assert not report.skipped


def bit_for_bit(student, tangent=None):
    torch.manual_seed(0)
    distiller = Head(student)
    batches, held_out = [batch(dtype=torch.float32) for _ in range(3)], batch(dtype=torch.float32)
    for options in ORDERS.values():
        made, ordinary = copy.deepcopy(distiller), copy.deepcopy(distiller)
        optimizer, meta_optimizer = optimizers(made)
        other, _ = optimizers(ordinary)
        engine = MetaKD(made, optimizer, meta_optimizer, tangent=tangent, **options)
        torch.manual_seed(1)
        for train in batches:
            engine.step(train, held_out if engine.wants_validation else None)
        result = everything(made, optimizer)
        torch.manual_seed(1)
        for train in batches:
            plain_step(ordinary, train, other)
        expected = everything(ordinary, other)
        assert [k for k in expected if not torch.equal(result[k], expected[k])] == [], options


# ---------------------------------------------------------------- what runs again in the backward pass
class Checkpointed(Net):
    def forward(self, x):
        x = self.middle(checkpoint(self.first, x, use_reentrant=False))
        feature = checkpoint(self.second, x, use_reentrant=False)
        return self.classifier(feature.mean((2, 3))), feature


def test_checkpointed_student():
    agrees(Checkpointed(nn.MaxPool2d(2)))
    bit_for_bit(Checkpointed(nn.Sequential(nn.MaxPool2d(2), nn.Dropout(0.3))))


def test_checkpointed_head():
    class Deep(Head):
        def __init__(self, student):
            super().__init__(student)
            self.connector = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.Sigmoid())

        def losses(self, outputs, teacher_outputs, targets):
            moved = checkpoint(self.connector, outputs[1] * self.phi[0], use_reentrant=False)
            return {**super().losses(outputs, teacher_outputs, targets), "moved": self.phi[0] * moved.square().mean()}

    torch.manual_seed(0)
    distiller = Deep(Net()).double()
    train, validation = batch(), batch()
    expected = reference(distiller, train, validation)
    for options in ({}, {"commit": "rehead"}, {"commit": "separate"}):
        made = copy.deepcopy(distiller)
        MetaKD(made, *optimizers(made), **options).step(train, validation)
        assert_close(made.phi.grad, expected)


# ---------------------------------------------------------------- what is there twice
class Twice(Net):
    def forward(self, x):
        logits, feature = super().forward(x)
        mirrored, other = super().forward(x.flip(3))
        return logits + mirrored, feature * other


def tied_weights():
    student = Net()
    student.conv3 = nn.Conv2d(6, 6, 3, padding=1)
    student.conv3.weight = student.conv2.weight
    student.middle = student.conv3
    return student


def one_module_by_two_names():
    student = Net()
    student.conv1 = nn.Conv2d(3, 6, 3, padding=1)
    student.middle = nn.Sequential(student.conv2, student.norm2)
    return student


@pytest.mark.parametrize("make", [Twice, tied_weights, one_module_by_two_names])
def test_shared_and_repeated(make):
    student = make()
    agrees(student)
    bit_for_bit(student.float())
    assert len(list(student.parameters())) == len({id(p) for p in student.parameters()})


# ---------------------------------------------------------------- what does not move
def gated_without_gradient(x):
    with torch.no_grad():
        gate = torch.sigmoid(x.mean((2, 3), keepdim=True))
        gate.mul_(2)
    return x * gate


class Straight(torch.autograd.Function):
    """What a Function computes has a gradient, although its forward runs without."""

    @staticmethod
    def forward(ctx, x):
        gate = torch.sigmoid(x)
        ctx.save_for_backward(x)
        return x * gate

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return gradient * (gate + x * gate * (1 - gate))


CONSTANTS = {
    "no_grad": gated_without_gradient,
    "maximum": lambda x: x * torch.no_grad()(lambda x: x.flatten(1).max(1))(x)[0].view(-1, 1, 1, 1),
    "detach": lambda x: x * torch.sigmoid(x.detach().mean((2, 3), keepdim=True)),
    "data": lambda x: x * torch.sigmoid(x.data.mean((2, 3), keepdim=True)),
    "straight through": lambda x: x + (torch.round(4 * x) / 4 - x).detach(),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_stay(name):
    student = Net(Applied(CONSTANTS[name]))
    agrees(student)
    bit_for_bit(student.float())


def test_autograd_function_is_no_constant():
    agrees(Net(Applied(Straight.apply)), tangents=("forward", "central"))


@pytest.mark.parametrize("normalise", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_parametrised_student(normalise):
    student = Net()
    student.conv2 = normalise(student.conv2)
    bit_for_bit(student)
    agrees(student, tangents=("forward", "central"))


def test_spectral_norm_in_forward_mode():
    student = Net()
    student.conv2 = parametrizations.spectral_norm(student.conv2)
    agrees(student, tangents=("jvp",))


def test_detached_outputs_do_not_move():
    class Detached(Net):
        def forward(self, x):
            logits, feature = super().forward(x)
            return logits, feature.detach()

    agrees(Detached())


class Weighted(Net):
    """Its classifier's weight is an output, and a BatchNorm statistic, which the student's step changes."""

    def forward(self, x):
        logits, feature = super().forward(x)
        return logits, feature, self.classifier.weight.mT, self.norm2.running_mean


def test_parameters_and_buffers_as_outputs():
    class OnWeights(Head):
        def losses(self, outputs, teacher_outputs, targets):
            logits, feature, weight, mean = outputs
            parts = super().losses((logits, feature), teacher_outputs, targets)
            return {**parts, "weight": self.phi[0] * weight.square().sum() * (1 + mean.square().sum())}

    agrees(Weighted(), head=OnWeights)


# ---------------------------------------------------------------- transformed functions
def test_functions_under_vmap_are_left_alone():
    class Mapped(Net):
        def first(self, x):
            return torch.vmap(lambda x: F.max_pool2d(F.relu(self.conv1(x[None])), 2)[0])(x)

    agrees(Mapped())


def test_a_compiled_function_in_the_student():
    class Partly(Net):
        @torch.compile(backend="aot_eager")
        def second(self, x):
            return F.silu(self.norm2(self.conv2(x)))

    torch.manual_seed(0)
    distiller = Head(Partly()).double()
    train, validation = batch(), batch()
    report = MetaKD(distiller, *optimizers(distiller)).step(train, validation)
    assert report.tangent_error < 1e-3
    assert not report.skipped

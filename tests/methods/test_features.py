"""FitNet, AT, NST and ReviewKD against plain formulas; features that are tokens."""

import pytest
import torch
from torch.nn import functional as F

from kdfast.methods import AT, NST, FitNet, ReviewKD
from kdfast.methods.features import as_map
from kdfast.methods.reviewkd import ABF
from kdfast.reference.pathways import hcl
from kdfast.train.loop import ordinary_step

METHODS = [FitNet, AT, NST, ReviewKD]


def run(distiller, task):
    inputs, targets = task.data(6)
    inputs = inputs.double()
    outputs, taught = distiller.student_outputs(inputs), distiller.teacher_outputs(inputs)
    return outputs, taught, targets, distiller.losses(outputs, taught, targets)


def test_fitnet_is_the_mean_square_after_the_regressor(task):
    distiller = FitNet(task.student(), task.teacher(), weight=7.0).double()
    outputs, taught, targets, parts = run(distiller, task)
    w, b = distiller.regressor.weight[:, :, 0, 0], distiller.regressor.bias
    guided = torch.einsum("oi,bihw->bohw", w, outputs[1][1]) + b[:, None, None]
    torch.testing.assert_close(parts["hint"], 7 * (guided - taught[1][1]).square().mean())
    torch.testing.assert_close(parts["task"], F.cross_entropy(outputs[0], targets))
    assert FitNet(task.student(), task.teacher(), layer=0).regressor.in_channels == 4
    with pytest.raises(ValueError, match=r"layer must be in \[0, 3\), one of the features, got 3"):
        FitNet(task.student(), task.teacher(), layer=3)


def test_at_is_the_difference_of_unit_maps(task):
    distiller = AT(task.student(), task.teacher(), weight=7.0).double()
    outputs, taught, _, parts = run(distiller, task)
    expected = 0.0
    for s, t in zip(outputs[1], taught[1], strict=True):
        a, b = (x.square().sum(1).flatten(1) for x in (s, t))
        expected += (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)).square().mean()
    torch.testing.assert_close(parts["attention"], 7 * expected)


def test_nst_is_the_mean_of_squared_kernels(task):
    distiller = NST(task.student(), task.teacher(), weight=7.0).double()
    outputs, taught, _, parts = run(distiller, task)
    expected = 0.0
    for s, t in zip(outputs[1], taught[1], strict=True):
        for i in range(len(s)):  # one image at a time, one pair of channels at a time
            x, y = ([c.flatten() / c.norm().clamp(min=1e-12) for c in m[i]] for m in (s, t))
            k = lambda a, b: torch.stack([(p @ q) ** 2 for p in a for q in b]).mean()  # noqa: E731
            expected += (k(x, x) + k(y, y) - 2 * k(x, y)) / len(s)
    torch.testing.assert_close(parts["selectivity"], 7 * expected)


def test_reviewkd_fuses_from_the_deepest_up(task):
    torch.manual_seed(0)
    distiller = ReviewKD(task.student(), task.teacher(), weight=7.0, warmup_epochs=4).double()
    distiller.fusions.eval()
    outputs, taught, _, parts = run(distiller, task)
    students = [*outputs[1], outputs[1][-1].mean((2, 3), keepdim=True)]
    teachers = [*taught[1], taught[1][-1].mean((2, 3), keepdim=True)]
    deeper, expected = None, 0.0
    for level in (3, 2, 1, 0):
        abf, x = distiller.fusions[level], students[level]
        x = abf.project(x)
        if level < 3:
            y = F.interpolate(deeper, x.shape[2:], mode="nearest")
            a = torch.sigmoid(abf.attention(torch.cat([x, y], 1)))
            x = x * a[:, 0:1] + y * a[:, 1:2]
        deeper = x
        expected = expected + hcl(abf.out(x), teachers[level])
    torch.testing.assert_close(parts["review"], 7 * expected)
    assert distiller.fusions[3].attention is None
    shares = []
    for epoch in range(6):
        distiller.start_epoch(epoch, 6)
        shares.append(distiller.losses(outputs, taught, task.data(6)[1])["review"] / parts["review"])
    assert torch.stack(shares).tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])


def test_reviewkd_begins_as_published():
    """Projections uniform within sqrt(3 / fan-in); the attention as PyTorch's convolutions, within sqrt(1 / fan-in)."""
    torch.manual_seed(0)
    fusion = ABF(64, 128, 64, fuse=True)
    for layer, bound in ((fusion.project[0], 3), (fusion.out[0], 3), (fusion.attention, 1)):
        size = (bound / layer.weight[0].numel()) ** 0.5
        assert 0.95 * size < layer.weight.abs().max() <= size


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_the_student_and_the_heads_only(method, task):
    distiller = method(task.student(), task.teacher()).double()
    assert not distiller.teacher.training
    distiller.teacher.zero_grad()  # it has some of its own training
    _, taught, _, parts = run(distiller, task)
    assert not any(x.requires_grad for x in taught[1])
    sum(parts.values()).backward()
    assert all(p.grad is not None for p in distiller.inner_parameters())
    assert all(p.grad is None for p in distiller.teacher.parameters())
    assert list(distiller.meta_parameters()) == []
    task.student().double().load_state_dict(distiller.export().state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_training_and_its_state(method, task):
    torch.manual_seed(0)
    distiller = method(task.student(), task.teacher(), weight=1.0)
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.05, momentum=0.9)
    losses = [ordinary_step(distiller, task.data(32), optimizer) for _ in range(20)]
    assert torch.stack(losses[-5:]).mean() < 0.8 * torch.stack(losses[:5]).mean()
    fresh = method(task.student(), task.teacher(), weight=1.0)
    fresh.load_state_dict(distiller.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_networks_whose_maps_differ_in_size(method, task):
    """The student sees its images at half the size."""
    student = task.student()
    forward = student.forward
    student.forward = lambda x, features=False: forward(x[:, :, ::2, ::2], features=features)
    distiller = method(student, task.teacher()).double()
    *_, parts = run(distiller, task)
    assert all(part.isfinite() for part in parts.values())


def test_tokens_are_maps_of_patches():
    patches = torch.randn(2, 9, 5)
    for before in (0, 1, 2, 5):
        tokens = torch.cat([torch.randn(2, before, 5), patches], 1)
        assert torch.equal(as_map(tokens), patches.transpose(1, 2).reshape(2, 5, 3, 3))
    with pytest.raises(ValueError, match="A feature of 32 tokens is no square of patches"):
        as_map(torch.randn(2, 32, 5))
    with pytest.raises(ValueError, match=r"or \[batch, tokens, channels\], got \[2, 5\]"):
        as_map(torch.randn(2, 5))


def test_errors(task):
    with pytest.raises(ValueError, match=r"AT pairs features, .* got 2 and 3; wrap one in kdfast.models.Tapped"):
        AT(task.student(), task.teacher(), student_channels=(4, 6))
    with pytest.raises(ValueError, match="weight must be a finite number of at least 0, got -1"):
        NST(task.student(), task.teacher(), weight=-1)
    with pytest.raises(ValueError, match="warmup_epochs must be at least 0, got -1"):
        ReviewKD(task.student(), task.teacher(), warmup_epochs=-1)

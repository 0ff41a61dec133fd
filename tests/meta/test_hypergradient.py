"""The meta-gradient against exact double backward in fp64."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.optim import SGD, AdamW

from kdfast.meta import exact_hypergradient, meta_kd_step
from kdfast.meta.hypergradient import default_radius, default_tangent, direction

OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: AdamW(p, lr=1e-2),
}
NETWORKS = {"batchnorm": {"norm": True}, "dropout": {"norm": False, "dropout": 0.3}}


def flat(tensors):
    return torch.cat([x.flatten() for x in tensors])


def compare(distiller, optimizer, meta_optimizer, batches, **options):
    """The meta-gradient of a step, and what double backward says of the same step."""
    exact = flat(exact_hypergradient(distiller, *batches, optimizer))
    report = meta_kd_step(distiller, *batches, optimizer, meta_optimizer, **options)
    return flat(p.grad for p in distiller.meta_parameters()), exact, report


def assert_close(h, exact):
    assert torch.cosine_similarity(h, exact, dim=0) >= 0.9999
    assert (h - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("commit", ["reuse", "rehead", "separate"])
@pytest.mark.parametrize("tangent", ["forward", "central", "jvp", "exact"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("head", ["pathways", "temperatures", "connected"])
def test_equals_double_backward(head, optimizer, tangent, commit, network, tiny, double):
    distiller = tiny.distiller(head, **NETWORKS[network])
    optimizer = OPTIMIZERS[optimizer](list(distiller.inner_parameters()))
    meta_optimizer = SGD(distiller.meta_parameters(), lr=1.0)
    # three steps: the optimizer has its state, and phi and the connectors have moved between them
    for _ in range(3):
        h, exact, report = compare(
            distiller, optimizer, meta_optimizer, (tiny.batch(), tiny.batch()), tangent=tangent, commit=commit
        )
    assert_close(h, exact)
    if tangent in ("jvp", "exact"):
        torch.testing.assert_close(h, exact, rtol=1e-8, atol=1e-10 * exact.abs().max().item())
    torch.testing.assert_close(report.meta_gradient_norm, exact.norm(), rtol=0.01, atol=0)
    assert report.tangent_error < 1e-3
    assert not report.skipped


@pytest.mark.parametrize("tangent", ["forward", "central", "jvp"])
def test_default_radius_in_float32(tangent, tiny):
    distiller = tiny.distiller("connected")
    batches = [(tiny.batch(64), tiny.batch(64)) for _ in range(5)]
    errors = []
    for train, validation in batches:
        distiller.double()
        optimizer = SGD(distiller.inner_parameters(), lr=0.1)
        doubled = [(inputs.double(), targets) for inputs, targets in (train, validation)]
        exact = flat(exact_hypergradient(distiller, *doubled, optimizer)).float()
        distiller.float()
        meta_optimizer = SGD(distiller.meta_parameters(), lr=1.0)
        meta_kd_step(distiller, train, validation, optimizer, meta_optimizer, tangent=tangent)
        errors.append((distiller.phi.grad - exact).norm() / exact.norm())
    assert torch.stack(errors).median() < 0.01


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_displacement_does_not_depend_on_the_scale_of_normalised_weights(scale, tiny, double):
    """BatchNorm takes the scale out of the function; a displacement of one length for all would not follow it."""
    distiller = tiny.distiller("connected")
    for conv in (distiller.student.conv1, distiller.student.conv2):
        conv.weight.data.mul_(scale)
    optimizer = SGD(distiller.inner_parameters(), lr=0.1)
    meta_optimizer = SGD(distiller.meta_parameters(), lr=1.0)
    h, exact, _ = compare(distiller, optimizer, meta_optimizer, (tiny.batch(), tiny.batch()))
    assert_close(h, exact)


def test_weights_that_start_at_zero_do_not_stop_the_displacement(tiny, double):
    distiller = tiny.distiller("connected")
    torch.nn.init.zeros_(distiller.student.classifier.weight)
    optimizer = SGD(distiller.inner_parameters(), lr=0.1)
    meta_optimizer = SGD(distiller.meta_parameters(), lr=1.0)
    h, exact, report = compare(distiller, optimizer, meta_optimizer, (tiny.batch(), tiny.batch()))
    assert not report.skipped
    assert_close(h, exact)


def test_direction_has_the_relative_size_asked_for(double):
    values = [torch.full((2, 2), 3.0), torch.ones(4)]
    v = [torch.ones(2, 2), torch.full((4,), 2.0)]
    along = direction(values, v, [-0.5, -0.5], v, radius=0.01, both=True)
    matrix, vector = (x - t for x, t in zip(along.ahead, values, strict=True))
    for x, y, t in zip(along.ahead, along.behind, values, strict=True):
        torch.testing.assert_close(x + y, 2 * t)
    torch.testing.assert_close(matrix, -0.5 * along.epsilon * v[0])
    size = ((matrix.norm() / values[0].norm()) ** 2 + (vector.norm() / 4**0.5) ** 2) ** 0.5
    torch.testing.assert_close(size, torch.tensor(0.01))
    torch.testing.assert_close(along.slope, -0.5 * torch.tensor(4 * 1.0 + 4 * 4.0))


def test_exact_hypergradient_leaves_everything_as_it_was(tiny, double):
    distiller = tiny.distiller("connected", dropout=0.3)
    optimizer = SGD(distiller.inner_parameters(), lr=0.1, momentum=0.9)
    before = {k: x.clone() for k, x in distiller.state_dict().items()}
    random_state = torch.get_rng_state()
    exact_hypergradient(distiller, tiny.batch(), tiny.batch(), optimizer)
    torch.set_rng_state(random_state)
    batches = tiny.batch(), tiny.batch()
    random_state = torch.get_rng_state()
    exact_hypergradient(distiller, *batches, optimizer)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(x, before[k]) for k, x in distiller.state_dict().items())
    assert not optimizer.state
    assert all(p.grad is None for p in distiller.parameters())


def test_radius_follows_the_precision():
    p = torch.zeros(1)
    assert default_radius("forward", p.double()) < default_radius("forward", p)
    assert default_radius("central", p, held=False) < default_radius("central", p)
    with torch.autocast("cpu", torch.bfloat16):
        assert default_radius("central", p) == default_radius("central", p.bfloat16())
        with pytest.raises(
            ValueError, match=r"tangent='forward' has no accurate default displacement in bfloat16; use"
        ):
            default_radius("forward", p)
        assert default_tangent(p) == "central"
    assert default_tangent(p) == "forward"
    with pytest.raises(ValueError, match=r"no accurate default displacement in float8_e5m2; use radius="):
        default_radius("central", p.to(torch.float8_e5m2))


def test_compiled_student(tiny, double):
    """The engine asks the network for first derivatives only, which is all that a compiled one has."""
    distiller = tiny.distiller("temperatures")
    train, validation = tiny.batch(), tiny.batch()
    optimizer = SGD(distiller.inner_parameters(), lr=0.1)
    exact = flat(exact_hypergradient(distiller, train, validation, optimizer))
    distiller.student = torch.compile(distiller.student, backend="aot_eager", fullgraph=True)
    meta_kd_step(distiller, train, validation, optimizer, SGD(distiller.meta_parameters(), lr=1.0))
    assert_close(flat(p.grad for p in distiller.meta_parameters()), exact)


@pytest.mark.parametrize("commit", ["reuse", "rehead"])
@pytest.mark.parametrize("head", ["temperatures", "connected"])
def test_compiled_head(head, commit, tiny, double):
    """What is compiled runs in the training pass; the meta-gradient differentiates the head as it was before."""
    distiller = tiny.distiller(head)
    train, validation = tiny.batch(), tiny.batch()
    optimizer = SGD(distiller.inner_parameters(), lr=0.1)
    exact = flat(exact_hypergradient(distiller, train, validation, optimizer))
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    distiller.losses = torch.compile(distiller.losses, backend=backend)
    meta_kd_step(distiller, train, validation, optimizer, SGD(distiller.meta_parameters(), lr=1.0), commit=commit)
    assert compiled
    assert_close(flat(p.grad for p in distiller.meta_parameters()), exact)

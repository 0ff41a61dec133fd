"""MetaKD: rolling validation, updates now and then, shares of a batch, clipping, scaling, accumulation, processes."""

import copy
import itertools

import pytest
import torch
from torch.optim import SGD, AdamW

from kdfast.meta import MetaKD, exact_hypergradient
from kdfast.meta.hypergradient import train_parts, validation_loss
from kdfast.meta.inner import functional_step
from kdfast.meta.shadow import Shadow
from tests.meta.test_hypergradient import assert_close, flat
from tests.meta.test_step import everything, ordinary_step


def optimizers(distiller, lr=0.1, meta_lr=1.0):
    optimizer = SGD(distiller.inner_parameters(), lr=lr, momentum=0.9, nesterov=True)
    return optimizer, SGD(distiller.meta_parameters(), lr=meta_lr)


def without_dropout(distiller):
    for module in distiller.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return distiller


def meta_gradient(distiller):
    return flat(p.grad for p in distiller.meta_parameters())


# ---------------------------------------------------------------- rolling
@pytest.mark.parametrize("head", ["pathways", "temperatures", "connected"])
def test_rolling_validates_on_the_next_training_batch(head, tiny, double):
    distiller = tiny.distiller(head, norm=True, dropout=0.3)
    optimizer, meta_optimizer = optimizers(distiller)
    engine = MetaKD(distiller, optimizer, meta_optimizer, validation="rolling")
    batches = [tiny.batch() for _ in range(4)]
    first = engine.step(batches[0])
    assert first.validation_loss is None
    assert first.skipped is None
    for now, following in itertools.pairwise(batches[1:]):
        before = copy.deepcopy((distiller, optimizer.state_dict(), torch.get_rng_state()))
        engine.step(now)
        random_state = torch.get_rng_state()
        # The step just taken, from where it began: phi had moved before its head ran.
        reference, state, at_start = before
        for p, q in zip(reference.meta_parameters(), distiller.meta_parameters(), strict=True):
            p.data.copy_(q)
        reference_optimizer, _ = optimizers(reference)
        reference_optimizer.load_state_dict(state)
        torch.set_rng_state(at_start)
        exact = flat(exact_hypergradient(reference, now, following, reference_optimizer))
        torch.set_rng_state(random_state)
        peek = copy.deepcopy(engine)
        report = peek.step(following)
        h = meta_gradient(peek.distiller)
        if head != "connected":  # whose dropout the validation pass draws from elsewhere
            assert_close(h, exact)
            assert report.tangent_error < 1e-3
        torch.set_rng_state(random_state)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("head", ["pathways", "connected"])
def test_rolling_leaves_the_student_bit_for_bit(head, every, tiny):
    distiller = tiny.distiller(head, norm=True, dropout=0.3)
    ordinary = copy.deepcopy(distiller)
    optimizer, meta_optimizer = optimizers(distiller, meta_lr=0.0)
    other, _ = optimizers(ordinary)
    engine = MetaKD(distiller, optimizer, meta_optimizer, validation="rolling", every=every)
    batches = [tiny.batch() for _ in range(4)]
    torch.manual_seed(1)
    reports = [engine.step(batch) for batch in batches]
    result = everything(distiller, optimizer)
    torch.manual_seed(1)
    for batch in batches:
        ordinary_step(ordinary, batch, other)
    expected = everything(ordinary, other)
    assert [k for k in expected if not torch.equal(result[k], expected[k])] == []
    learned = [report.validation_loss is not None for report in reports]
    assert learned == ([False, True, True, True] if every == 1 else [False, False, True, False])


# ---------------------------------------------------------------- every, fraction
def test_every_so_many_steps(tiny):
    distiller = tiny.distiller("connected", dropout=0.3)
    ordinary = copy.deepcopy(distiller)
    optimizer, meta_optimizer = optimizers(distiller, meta_lr=0.0)
    other, _ = optimizers(ordinary)
    engine = MetaKD(distiller, optimizer, meta_optimizer, every=3)
    torch.manual_seed(1)
    batches = [tiny.batch() for _ in range(5)]
    validation = tiny.batch()
    learned = []
    torch.manual_seed(2)
    for batch in batches:
        wanted = engine.wants_validation
        report = engine.step(batch, validation if wanted else None)
        learned.append(report.validation_loss is not None)
        assert learned[-1] == wanted
    assert learned == [True, False, False, True, False]
    result = everything(distiller, optimizer)
    torch.manual_seed(2)
    for batch in batches:
        ordinary_step(ordinary, batch, other)
    expected = everything(ordinary, other)
    assert [k for k in expected if not torch.equal(result[k], expected[k])] == []
    with pytest.raises(TypeError, match="validation_batch must be a pair"):
        MetaKD(distiller, optimizer, meta_optimizer).step(batches[0])


@pytest.mark.parametrize("tangent", ["forward", "central", "jvp", "exact"])
@pytest.mark.parametrize("head", ["pathways", "temperatures"])
def test_fraction_takes_the_meta_gradient_of_a_share(head, tangent, tiny, double):
    """Without BatchNorm the meta-gradient of a quarter is that of a loss over that quarter."""
    distiller = tiny.distiller(head, norm=False)
    for module in distiller.modules():  # nor in the transforms
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    optimizer, meta_optimizer = optimizers(distiller)
    train, validation = tiny.batch(16), tiny.batch()
    reference = copy.deepcopy(distiller)
    engine = MetaKD(distiller, optimizer, meta_optimizer, tangent=tangent, fraction=0.25)
    report = engine.step(train, validation)

    inner, meta = list(reference.inner_parameters()), list(reference.meta_parameters())
    shadow = Shadow(reference, inner)
    other, _ = optimizers(reference)
    theta = [p.detach().clone().requires_grad_() for p in inner]
    whole = sum(shadow.at(theta, train_parts, train, reference.teacher_outputs(train[0])).values())
    gradients = torch.autograd.grad(whole, theta, allow_unused=True)
    stepped = [x.detach().requires_grad_() for x in functional_step(other, inner, theta, gradients)]
    v = torch.autograd.grad(shadow.at(stepped, validation_loss, validation), stepped, allow_unused=True)
    part = tuple(x[:4] for x in train)
    loss = sum(shadow.at(theta, train_parts, part, reference.teacher_outputs(part[0])).values())
    g = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True)
    slope = sum((-0.1 * 1.9 * y * x).sum() for y, x in zip(g, v, strict=True) if y is not None and x is not None)
    assert_close(meta_gradient(distiller), flat(torch.autograd.grad(slope, meta)))
    assert not report.skipped


# ---------------------------------------------------------------- clipping, scaling, accumulation
@pytest.mark.parametrize("commit", ["reuse", "rehead", "separate"])
@pytest.mark.parametrize("head", ["pathways", "connected"])
def test_clipping_is_differentiated_through(head, commit, tiny, double):
    distiller = without_dropout(tiny.distiller(head))
    train, validation = tiny.batch(), tiny.batch()
    reference = copy.deepcopy(distiller)
    inner, meta = list(reference.inner_parameters()), list(reference.meta_parameters())
    shadow, theta = Shadow(reference, inner), [p.detach().clone().requires_grad_() for p in inner]
    loss = sum(shadow.at(theta, train_parts, train, reference.teacher_outputs(train[0])).values())
    g = torch.autograd.grad(loss, theta, create_graph=True)
    norm = torch.cat([x.flatten() for x in g]).norm()
    bound = 0.5 * norm.item()
    clipped = [x * bound / (norm + 1e-6) for x in g]
    other, _ = optimizers(reference)
    stepped = functional_step(other, inner, theta, clipped)
    exact = flat(torch.autograd.grad(shadow.at(stepped, validation_loss, validation), meta))

    optimizer, meta_optimizer = optimizers(distiller)
    engine = MetaKD(distiller, optimizer, meta_optimizer, commit=commit, max_norm=bound)
    report = engine.step(train, validation)
    assert_close(meta_gradient(distiller), exact)
    assert report.tangent_error < 1e-3
    # A bound that is not reached changes nothing.
    plain, loose = copy.deepcopy(reference), copy.deepcopy(reference)
    MetaKD(plain, *optimizers(plain)).step(train, validation)
    MetaKD(loose, *optimizers(loose), max_norm=1e6).step(train, validation)
    torch.testing.assert_close(meta_gradient(plain), meta_gradient(loose), rtol=1e-6, atol=1e-12)
    assert torch.equal(plain.student.conv1.weight, loose.student.conv1.weight)


def test_clipped_step_is_the_ordinary_one(tiny):
    distiller = without_dropout(tiny.distiller("connected"))
    ordinary = copy.deepcopy(distiller)
    train = tiny.batch()
    optimizer, meta_optimizer = optimizers(distiller, meta_lr=0.0)
    MetaKD(distiller, optimizer, meta_optimizer, max_norm=0.1).step(train, tiny.batch())
    loss = sum(train_parts(ordinary, train, ordinary.teacher_outputs(train[0])).values())
    other, _ = optimizers(ordinary)
    loss.backward(inputs=list(ordinary.inner_parameters()))
    torch.nn.utils.clip_grad_norm_(list(ordinary.inner_parameters()), 0.1)
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(distiller.parameters(), ordinary.parameters(), strict=True))


@pytest.mark.parametrize("commit", ["reuse", "rehead", "separate"])
@pytest.mark.parametrize("head", ["pathways", "connected"])
def test_a_power_of_two_as_loss_scale_changes_nothing(head, commit, tiny):
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        torch.manual_seed(0)
        distiller = tiny.distiller(head)
        optimizer, meta_optimizer = optimizers(distiller)
        engine = MetaKD(distiller, optimizer, meta_optimizer, commit=commit, scaler=scaler)
        for _ in range(3):
            report = engine.step(tiny.batch(), tiny.batch())
        results.append((meta_gradient(distiller), report.loss, report.validation_loss, report.tangent_error))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_an_overflow_under_a_scaler_skips_both_steps(tiny):
    distiller = tiny.distiller("connected")
    optimizer, meta_optimizer = optimizers(distiller)
    before = copy.deepcopy(distiller.state_dict())
    losses = distiller.losses
    distiller.losses = lambda *args: {name: 1e3 * part for name, part in losses(*args).items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    engine = MetaKD(distiller, optimizer, meta_optimizer, scaler=scaler)
    report = engine.step(tiny.batch(), tiny.batch())
    assert report.skipped
    assert engine.skipped == 1
    assert scaler.get_scale() < 2e38
    assert all(torch.equal(p, before[name]) for name, p in distiller.named_parameters())


def test_float16_with_a_scaler(tiny):
    errors = []
    for _ in range(7):
        distiller = tiny.distiller("connected")
        exact_of = copy.deepcopy(distiller).double()
        train, validation = tiny.batch(64), tiny.batch(64)
        double = [(x.double(), y) for x, y in (train, validation)]
        exact = flat(exact_hypergradient(exact_of, *double, optimizers(exact_of)[0]))
        optimizer, meta_optimizer = optimizers(distiller)
        engine = MetaKD(distiller, optimizer, meta_optimizer, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
        with torch.autocast("cpu", torch.float16):
            engine.step(train, validation)
        errors.append((meta_gradient(distiller) - exact).norm() / exact.norm())
    assert torch.stack(errors).median() < 0.05  # activations rounded to eleven bits; a single one may cancel


@pytest.mark.parametrize("validation", ["batch", "rolling"])
@pytest.mark.parametrize("commit", ["reuse", "rehead", "separate"])
@pytest.mark.parametrize("head", ["pathways", "temperatures"])
def test_accumulated_batches_are_one_batch(head, commit, validation, tiny, double):
    if validation == "rolling" and commit != "reuse":
        return
    distiller = tiny.distiller(head, norm=False)
    for module in distiller.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    whole = copy.deepcopy(distiller)
    held_out, batches = tiny.batch(), [tiny.batch() for _ in range(2)]
    for d, split in ((distiller, True), (whole, False)):
        engine = MetaKD(d, *optimizers(d), commit=commit, validation=validation)
        for inputs, targets in batches:
            parts = list(zip(inputs.chunk(2), targets.chunk(2), strict=True)) if split else (inputs, targets)
            engine.step(parts, None if validation == "rolling" else held_out)
    for a, b in zip(distiller.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(meta_gradient(distiller), meta_gradient(whole), rtol=1e-5, atol=1e-9)


# ---------------------------------------------------------------- heads
def test_a_head_may_detach_the_outputs(tiny, double):
    """What is constant to autograd is constant to the meta-gradient."""
    distiller = tiny.distiller("connected")
    losses = distiller.losses

    def with_constant(outputs, teacher_outputs, targets):
        parts = losses(outputs, teacher_outputs, targets)
        parts["constant"] = distiller.phi[0] * (outputs[1][0] * outputs[1][0].detach()).mean()
        return parts

    distiller.losses = with_constant
    optimizer, meta_optimizer = optimizers(distiller)
    batches = tiny.batch(), tiny.batch()
    exact = flat(exact_hypergradient(distiller, *batches, optimizer))
    MetaKD(distiller, optimizer, meta_optimizer).step(*batches)
    assert_close(meta_gradient(distiller), exact)


def test_the_default_is_the_papers_to_a_percent(tiny):
    """One step's phi from the same state: the papers' central difference in their order, in fp64, and the default."""
    for head in ("pathways", "temperatures", "connected"):
        distiller = without_dropout(tiny.distiller(head))
        paper = copy.deepcopy(distiller).double()
        train, validation = tiny.batch(64), tiny.batch(64)
        MetaKD(paper, *optimizers(paper), tangent="central", commit="separate").step(
            (train[0].double(), train[1]), (validation[0].double(), validation[1])
        )
        MetaKD(distiller, *optimizers(distiller)).step(train, validation)
        h, expected = meta_gradient(distiller).double(), meta_gradient(paper)
        assert (h - expected).norm() <= 0.01 * expected.norm(), head


def test_learning_with_a_lag_leads_to_the_same_weights(tiny):
    """Twenty steps: phi by "reuse" and "rolling" stays near the papers' order, measured in how far phi moved."""
    torch.manual_seed(3)
    batches = [(tiny.batch(32), tiny.batch(32)) for _ in range(21)]
    start = tiny.distiller("connected")
    ends = {}
    for name, options in {
        "paper": {"commit": "separate", "tangent": "central"}, "rehead": {"commit": "rehead"}, "reuse": {},
    }.items():  # fmt: skip
        distiller = copy.deepcopy(start)
        meta_optimizer = AdamW(distiller.meta_parameters(), lr=0.02)
        engine = MetaKD(distiller, SGD(distiller.inner_parameters(), lr=0.05), meta_optimizer, **options)
        torch.manual_seed(4)
        for train, validation in batches:
            engine.step(train, validation)
        ends[name] = distiller.phi.detach()
    moved = (ends["paper"] - start.phi).norm()
    assert moved > 0.2
    assert (ends["rehead"] - ends["paper"]).norm() <= 0.01 * moved
    assert (ends["reuse"] - ends["paper"]).norm() <= 0.05 * moved  # a step behind


def test_options_that_do_not_go_together(tiny):
    distiller = tiny.distiller("connected")
    with pytest.raises(ValueError, match="validation='rolling' needs commit='reuse', got 'separate'"):
        MetaKD(distiller, *optimizers(distiller), validation="rolling", commit="separate")
    with pytest.raises(ValueError, match="every must be a number of steps of at least 1, got 0"):
        MetaKD(distiller, *optimizers(distiller), every=0)

"""What a meta-step leaves behind, what it skips, and what it refuses."""

import copy
import inspect

import pytest
import torch
from torch.optim import SGD, AdamW

from kdfast.meta import meta_kd_step
from kdfast.methods import Alone

COMMITS = pytest.mark.parametrize("commit", ["reuse", "rehead", "separate"])
OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p: AdamW(p, lr=1e-2),
}


def ordinary_step(distiller, batch, optimizer):
    inputs, targets = batch
    optimizer.zero_grad(set_to_none=True)
    teacher_outputs = distiller.teacher_outputs(inputs)
    parts = distiller.losses(distiller.student_outputs(inputs), teacher_outputs, targets)
    loss = sum(parts.values())
    loss.backward()
    optimizer.step()
    return loss.detach()


def everything(distiller, optimizer):
    """Parameters, BatchNorm statistics, gradients, optimizer state and random state, as one dict."""
    tensors = dict(distiller.state_dict())
    for name, p in distiller.student.named_parameters():
        tensors[f"gradient {name}"] = p.grad
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"state {i} {name}": torch.as_tensor(x) for name, x in state.items() if x is not None}
    return {name: x.clone() for name, x in tensors.items()} | {"random": torch.get_rng_state()}


@COMMITS
@pytest.mark.parametrize("tangent", ["forward", "central", "jvp", "exact"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("head", ["pathways", "temperatures", "connected"])
@pytest.mark.parametrize("autocast", [False, True])
def test_student_ends_bit_for_bit_where_ordinary_steps_lead(autocast, head, name, tangent, commit, tiny):
    meta = tiny.distiller(head, norm=True, dropout=0.3)
    ordinary = copy.deepcopy(meta)
    batches = [(tiny.batch(), tiny.batch()) for _ in range(4)]
    optimizers = [OPTIMIZERS[name](list(d.inner_parameters())) for d in (meta, ordinary)]
    meta_optimizer = SGD(meta.meta_parameters(), lr=0.0)

    with torch.autocast(
        "cpu", torch.bfloat16, enabled=autocast
    ):  # around all steps: its weight cache must not go stale
        torch.manual_seed(1)
        losses = [
            meta_kd_step(meta, *pair, optimizers[0], meta_optimizer, tangent=tangent, commit=commit, radius=1e-3).loss
            for pair in batches
        ]
        result = everything(meta, optimizers[0])
        torch.manual_seed(1)
        expected_losses = []
        for train, _ in batches:
            expected_losses.append(ordinary_step(ordinary, train, optimizers[1]))
            torch.clear_autocast_cache()
    expected = everything(ordinary, optimizers[1])

    assert result.keys() == expected.keys()
    assert [k for k in expected if not torch.equal(result[k], expected[k])] == []
    assert torch.equal(torch.stack(losses), torch.stack(expected_losses))


@COMMITS
def test_validation_sees_the_stepped_student_under_autocast(commit, tiny):
    distiller = tiny.distiller("connected")
    optimizer = SGD(distiller.inner_parameters(), lr=0.5)
    meta_optimizer = SGD(distiller.meta_parameters(), lr=0.0)
    train, validation = tiny.batch(), tiny.batch()
    with torch.autocast("cpu", torch.bfloat16):
        report = meta_kd_step(distiller, train, validation, optimizer, meta_optimizer, tangent="central", commit=commit)
    with torch.autocast("cpu", torch.bfloat16):
        loss = distiller.validation_loss(distiller.student_outputs(validation[0]), validation[1])
    assert torch.equal(report.validation_loss, loss.detach())


def test_head_is_compared_with_itself(tiny):
    """The head's derivative is taken at the training pass's own meta-parameters, connectors, buffers, random state and
    teacher outputs."""
    distiller = tiny.distiller("connected", dropout=0.3)
    seen = []
    losses = distiller.losses

    def spy(outputs, teacher_outputs, targets):
        state = [distiller.phi, *distiller.connector.parameters(), *distiller.connector.buffers(), teacher_outputs[0]]
        seen.append([x.detach().clone() for x in state] + [torch.get_rng_state()])
        return losses(outputs, teacher_outputs, targets)

    distiller.losses = spy
    optimizer = SGD(distiller.inner_parameters(), lr=0.5)
    meta_optimizer = SGD(distiller.meta_parameters(), lr=10.0)
    for tangent in ("forward", "central", "jvp"):
        seen.clear()
        meta_kd_step(distiller, tiny.batch(), tiny.batch(), optimizer, meta_optimizer, tangent=tangent)
        assert len(seen) == 2  # in the training pass, and for its derivative
        assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@pytest.mark.parametrize("commit", ["rehead", "separate"])
def test_the_papers_order_steps_with_the_new_meta_parameters(commit, tiny):
    distiller = tiny.distiller("connected")
    reference = copy.deepcopy(distiller)
    optimizer, meta_optimizer = (
        SGD(distiller.inner_parameters(), lr=0.1),
        SGD(distiller.meta_parameters(), lr=1.0),
    )
    train, validation = tiny.batch(), tiny.batch()
    torch.manual_seed(1)
    meta_kd_step(distiller, train, validation, optimizer, meta_optimizer, commit=commit)
    assert not torch.equal(distiller.phi, reference.phi)
    reference.phi.data.copy_(distiller.phi)
    torch.manual_seed(1)
    ordinary_step(reference, train, SGD(reference.inner_parameters(), lr=0.1))
    assert torch.equal(distiller.student.conv1.weight, reference.student.conv1.weight)


@COMMITS
@pytest.mark.parametrize("head", ["pathways", "temperatures"])
def test_meta_step_lowers_the_validation_loss_after_the_same_step(head, commit, tiny, double):
    distiller = tiny.distiller(head)
    before = copy.deepcopy(distiller)
    train, validation = tiny.batch(), tiny.batch()
    optimizer = SGD(distiller.inner_parameters(), lr=0.1)
    meta_optimizer = SGD(distiller.meta_parameters(), lr=1.0)
    report = meta_kd_step(distiller, train, validation, optimizer, meta_optimizer, commit=commit)
    for old, new in zip(before.meta_parameters(), distiller.meta_parameters(), strict=True):
        old.data.copy_(new)
    ordinary_step(before, train, SGD(before.inner_parameters(), lr=0.1))
    loss = before.validation_loss(before.student_outputs(validation[0]), validation[1])
    predicted = report.meta_gradient_norm**2  # to first order, a step of rate 1 along h
    assert 0.5 * predicted < report.validation_loss - loss < 2 * predicted


@COMMITS
@pytest.mark.parametrize("cause", ["zero", "nan", "unreached"])
def test_update_is_skipped_and_the_student_still_steps(cause, commit, tiny):
    distiller = tiny.distiller("connected", dropout=0.3)
    distiller.unused = torch.nn.Parameter(torch.ones(2))
    ordinary = copy.deepcopy(distiller)
    train, validation = tiny.batch(), tiny.batch()
    if cause == "zero":
        distiller.validation_loss = lambda outputs, targets: 0.0 * outputs[0].sum()
    elif cause == "nan":
        validation[0][0, 0, 0, 0] = torch.nan
    else:  # the validation loss depends on nothing that the train loss moves
        distiller.validation_loss = lambda outputs, targets: distiller.unused.sum()
    optimizer = SGD(distiller.inner_parameters(), lr=0.1)
    # decoupled weight decay would move phi in any step that is taken
    meta_optimizer = AdamW(distiller.meta_parameters(), lr=0.1, weight_decay=0.5)
    torch.manual_seed(1)
    report = meta_kd_step(distiller, train, validation, optimizer, meta_optimizer, commit=commit)
    random_state = torch.get_rng_state()
    torch.manual_seed(1)
    ordinary_step(ordinary, train, SGD(ordinary.inner_parameters(), lr=0.1))
    assert report.skipped
    assert report.meta_gradient_norm == 0
    assert torch.equal(distiller.phi, ordinary.phi)
    assert torch.equal(distiller.student.conv1.weight, ordinary.student.conv1.weight)
    assert torch.equal(random_state, torch.get_rng_state())  # the validation pass has drawn, and no replay followed


def test_update_is_skipped_where_the_displaced_head_overflows(tiny):
    distiller = tiny.distiller("connected")
    losses, calls = distiller.losses, []

    def overflows_when_displaced(*args):
        calls.append(None)
        return {k: x * (torch.inf if len(calls) > 1 else 1.0) for k, x in losses(*args).items()}

    distiller.losses = overflows_when_displaced
    optimizer = SGD(distiller.inner_parameters(), lr=0.1)
    meta_optimizer = SGD(distiller.meta_parameters(), lr=0.1)
    before = distiller.phi.detach().clone()
    report = meta_kd_step(distiller, tiny.batch(), tiny.batch(), optimizer, meta_optimizer)
    assert report.skipped
    assert torch.equal(distiller.phi, before)


def test_frozen_and_unused_parameters(tiny, double):
    distiller = tiny.distiller("connected")
    distiller.student.conv1.requires_grad_(False)
    distiller.unused = torch.nn.Parameter(torch.ones(2))
    optimizer = SGD([p for p in distiller.inner_parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    meta_optimizer = SGD(distiller.meta_parameters(), lr=1.0)
    report = meta_kd_step(distiller, tiny.batch(), tiny.batch(), optimizer, meta_optimizer)
    assert not report.skipped
    assert report.tangent_error < 1e-3
    assert torch.equal(distiller.unused, torch.ones(2))


def test_teacher_outputs_at_hand_are_used(tiny):
    reports = []
    for given in (False, True):
        torch.manual_seed(0)
        distiller = tiny.distiller("connected")
        train, validation = tiny.batch(), tiny.batch()
        options = {"teacher_outputs": distiller.teacher_outputs(train[0])} if given else {}
        if given:
            distiller.teacher_outputs = None  # not callable: would raise
        optimizer = SGD(distiller.inner_parameters(), lr=0.1)
        meta_optimizer = SGD(distiller.meta_parameters(), lr=0.1)
        reports.append(meta_kd_step(distiller, train, validation, optimizer, meta_optimizer, **options))
    assert torch.equal(reports[0].loss, reports[1].loss)
    assert torch.equal(reports[0].meta_gradient_norm, reports[1].meta_gradient_norm)


def test_report_is_detached_scalars(tiny):
    distiller = tiny.distiller("pathways")
    optimizer = SGD(distiller.inner_parameters(), lr=0.1)
    report = meta_kd_step(distiller, tiny.batch(), tiny.batch(), optimizer, SGD(distiller.meta_parameters(), lr=0.1))
    values = [*report.parts.values(), *(x for x in report if isinstance(x, torch.Tensor))]
    assert set(report.parts) == {"task", "pathways"}
    assert len(values) == 2 + 6
    assert all(x.dim() == 0 and not x.requires_grad for x in values)
    torch.testing.assert_close(sum(report.parts.values()), report.loss)


def test_no_value_is_read_back():
    """Reading a value makes a GPU wait; on the CPU it is free, and allowed where the code asks for the CPU first."""
    from kdfast.meta import engine, hypergradient, inner, tangents

    for module in (engine, hypergradient, inner, tangents):
        lines = [line for line in inspect.getsource(module).splitlines() if ".item()" in line or ".tolist()" in line]
        assert all("is_cpu" in line for line in lines), lines


@pytest.fixture
def arguments(tiny):
    distiller = tiny.distiller("connected")
    return {
        "distiller": distiller,
        "train_batch": tiny.batch(),
        "validation_batch": tiny.batch(),
        "optimizer": SGD(distiller.inner_parameters(), lr=0.1),
        "meta_optimizer": SGD(distiller.meta_parameters(), lr=0.1),
    }


def alone(arguments):
    student = Alone(arguments["distiller"].student)
    return {"distiller": student, "optimizer": SGD(student.parameters(), lr=0.1)}


def wrapped(arguments):
    class Wrapper(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module):  # without processes to join
            torch.nn.Module.__init__(self)
            self.module = module

    distiller = copy.copy(arguments["distiller"])
    distiller._modules = {**distiller._modules, "student": Wrapper(distiller.student)}
    return {"distiller": distiller}


def sharded(arguments):
    class FSDPModule(type(arguments["distiller"].student)):
        """What `fully_shard` makes of a class."""

    arguments["distiller"].student.__class__ = FSDPModule
    return {}


ERRORS = {
    "no meta-parameters": (alone, ValueError, r"Alone has no meta-parameters to learn; train it with an ordinary"),
    "shared": (
        lambda a: {"optimizer": SGD(a["distiller"].parameters(), lr=0.1)},
        ValueError,
        r"1 of Connected's 1 meta-parameters are also in the student's optimizer; build that from",
    ),
    "inner missing": (
        lambda a: {"optimizer": SGD(a["distiller"].student.parameters(), lr=0.1)},
        ValueError,
        r"4 of Connected's 12 trainable inner parameters are not in the optimizer; build it from",
    ),
    "meta missing": (
        lambda a: {"meta_optimizer": SGD(a["distiller"].student.parameters(), lr=0.1)},
        ValueError,
        r"1 of Connected's 1 meta-parameters are not in the meta_optimizer; build it from",
    ),
    "optimizer": (
        lambda a: {"optimizer": torch.optim.Adagrad(a["distiller"].inner_parameters())},
        ValueError,
        r"SGD, Adam and AdamW, got torch.optim.adagrad.Adagrad; use one of these",
    ),
    "tangent": (
        lambda a: {"tangent": "backward"},
        ValueError,
        r"tangent must be one of 'forward', 'central', 'jvp', 'exact', got 'backward'",
    ),
    "commit": (lambda a: {"commit": "now"}, ValueError, r"commit must be one of 'reuse', 'rehead', 'separate', got"),
    "fraction": (
        lambda a: {"fraction": 0.0},
        ValueError,
        r"fraction must be a share of the batch in \(0, 1\], got 0.0",
    ),
    "max_norm": (lambda a: {"max_norm": -1.0}, ValueError, r"max_norm must be positive, got -1.0; leave it out"),
    "wrapped": (
        wrapped,
        ValueError,
        r"Connected.student is wrapped in DistributedDataParallel, .* give the bare module",
    ),
    "sharded": (sharded, ValueError, r"Connected.student is sharded by FSDPModule, .* give the bare module"),
    "teachers": (
        lambda a: {"train_batch": [a["train_batch"]] * 2, "teacher_outputs": [None]},
        ValueError,
        r"teacher_outputs must be a list of 2, one a train batch, got 1",
    ),
    "radius": (lambda a: {"radius": 0.0}, ValueError, r"radius must be positive, got 0.0; leave it out"),
    "batch": (
        lambda a: {"train_batch": a["train_batch"][0]},
        TypeError,
        r"train_batch must be a pair \(inputs, targets\), got Tensor",
    ),
    "triple": (
        lambda a: {"validation_batch": (1, 2, 3)},
        TypeError,
        r"validation_batch must be a pair \(inputs, targets\), got 3 items",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case, arguments):
    change, error, text = ERRORS[case]
    before = copy.deepcopy(arguments["distiller"].state_dict())
    with pytest.raises(error, match=text):
        meta_kd_step(**(arguments | change(arguments)))
    assert all(torch.equal(x, before[k]) for k, x in arguments["distiller"].state_dict().items())

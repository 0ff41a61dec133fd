"""Whole steps as CUDA graphs. On a CPU the graph is played by the function itself, run on the memory it was recorded
on: what is copied, counted and recorded anew is tested there, what a GPU does with it where there is one."""

import copy

import pytest
import torch
from torch.optim import SGD, Adam
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast.meta import MetaKD, graphs
from tests.meta.test_step import everything

HEADS = ["pathways", "temperatures"]


@pytest.fixture
def played(monkeypatch):
    """A list to which every recording adds."""
    recordings = []

    def record(function, stream):
        recordings.append(function)
        return function

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "beside", lambda function, stream: function())
    return recordings


def engine(distiller, lr=0.1, device="cpu", **options):
    optimizer = SGD(distiller.inner_parameters(), lr=lr, momentum=0.9)
    made = MetaKD(distiller, optimizer, SGD(distiller.meta_parameters(), lr=0.5), **options)
    if device == "played":
        made._graphs = graphs.Graphs([])
    return made


def run(made, batches, validation, rates=None):
    reports = []
    for i, batch in enumerate(batches):
        if rates:
            made.optimizer.param_groups[0]["lr"] = rates[i]
        reports.append(made.step(batch, validation if made.wants_validation else None))
    return reports


def same(one, other, reports, expected):
    a, b = everything(one.distiller, one.optimizer), everything(other.distiller, other.optimizer)
    assert [k for k in b if not torch.equal(a[k], b[k])] == []
    for x, y in zip(reports, expected, strict=True):
        assert torch.equal(x.loss, y.loss)
        assert (x.validation_loss is None) == (y.validation_loss is None)
        assert y.validation_loss is None or torch.equal(x.validation_loss, y.validation_loss)
    for p, q in zip(one.distiller.meta_parameters(), other.distiller.meta_parameters(), strict=True):
        assert torch.equal(p, q)
        assert (p.grad is None) == (q.grad is None)
        assert q.grad is None or torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("head", HEADS)
def test_replayed_steps_are_the_ordinary_ones(head, every, tiny, played):
    distiller = tiny.distiller(head)
    pair = engine(distiller, device="played", every=every), engine(copy.deepcopy(distiller), every=every)
    batches, validation = [tiny.batch() for _ in range(4 * every + 6)], tiny.batch()
    reports, expected = (run(made, batches, validation) for made in pair)
    same(*pair, reports, expected)
    assert len(played) == (1 if every == 1 else 2)  # with a meta-step and without


def test_recorded_anew_when_a_number_changes_and_ordinary_when_a_shape_does(tiny, played):
    distiller = tiny.distiller("temperatures")
    pair = engine(distiller, device="played"), engine(copy.deepcopy(distiller))
    batches = [tiny.batch(8 if i == 6 else 12) for i in range(10)]
    rates = [0.1] * 5 + [0.01] * 5
    validation = tiny.batch()
    reports, expected = (run(made, batches, validation, rates) for made in pair)
    same(*pair, reports, expected)
    assert len(played) == 2  # one a rate; the batch of 8 came once


def test_ordinary_again_after_another_state_was_loaded(tiny, played):
    distiller = tiny.distiller("temperatures")
    pair = engine(distiller, device="played"), engine(copy.deepcopy(distiller))
    validation, batches = tiny.batch(), [tiny.batch() for _ in range(5)]
    for made in pair:
        fresh = copy.deepcopy(made.optimizer.state_dict())
        run(made, batches, validation)
        made.optimizer.load_state_dict(fresh)  # as before its first step: no momentum yet
    reports, expected = (run(made, batches, validation) for made in pair)
    same(*pair, reports, expected)
    assert len(played) == 2


def test_a_recording_casts_the_weights_itself(tiny, monkeypatch):
    """Around all steps autocast keeps the weights it has cast: those of before would be what every replay reads."""
    made, cast = engine(tiny.distiller("temperatures"), device="played"), []
    weight = made.distiller.student.conv1.weight

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].data_ptr() == weight.data_ptr():
                cast.append(func)
            return func(*args, **(kwargs or {}))

    def record(function, stream):
        def replay():
            with Casts():
                return function()

        return replay

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "beside", lambda function, stream: function())
    with torch.autocast("cpu", torch.bfloat16):
        run(made, [tiny.batch() for _ in range(graphs.WARMUP)], tiny.batch())
        made.distiller.student(tiny.batch()[0])  # an evaluation in between
        run(made, [tiny.batch()], tiny.batch())
    assert len(cast) >= 2  # before the step and after it


def test_random_numbers_are_refused_after_the_step(tiny, played):
    distiller = tiny.distiller("pathways", dropout=0.3)
    made, other = engine(distiller, device="played"), engine(copy.deepcopy(distiller))
    batch, validation = tiny.batch(), tiny.batch()
    torch.manual_seed(1)
    with pytest.raises(ValueError, match=r"draws no random numbers, and this one drew some .* leave cuda_graph out"):
        made.step(batch, validation)
    torch.manual_seed(1)
    other.step(batch, validation)
    same(made, other, [], [])


def test_what_cannot_be_recorded_is_said_before_anything_runs(tiny, monkeypatch):
    distiller = tiny.distiller("temperatures")
    with pytest.raises(ValueError, match=r"needs a student on an NVIDIA GPU, got one on cpu"):
        engine(distiller, cuda_graph=True)
    cuda = torch.device("cuda")
    adam = Adam(distiller.inner_parameters())
    with pytest.raises(ValueError, match=r"needs validation='batch', got 'rolling'"):
        graphs.check(cuda, "rolling", None)
    with pytest.raises(ValueError, match="cannot hold a GradScaler"):
        graphs.check(cuda, "batch", torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=r"needs Adam\(capturable=True\)"):
        graphs.check(cuda, "batch", None, adam)
    monkeypatch.setattr(graphs.processes, "count", lambda: 2)
    with pytest.raises(ValueError, match="is for one process, got 2"):
        graphs.check(cuda, "batch", None)


@pytest.mark.cuda
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("commit", ["reuse", "rehead", "separate"])
@pytest.mark.parametrize("head", HEADS)
def test_graph_on_a_gpu_takes_the_ordinary_steps(head, commit, every, bf16, tiny, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    distiller = tiny.distiller(head).cuda()
    options = {"commit": commit, "every": every, "max_norm": 1.0}
    pair = engine(distiller, cuda_graph=True, **options), engine(copy.deepcopy(distiller), **options)
    batches = [tuple(x.cuda() for x in tiny.batch()) for _ in range(4 * every + 6)]
    validation = tuple(x.cuda() for x in tiny.batch())
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        reports, expected = (run(made, batches, validation) for made in pair)
    for report, other in zip(reports, expected, strict=True):
        torch.testing.assert_close(report.loss, other.loss)
    for p, q in zip(pair[0].distiller.parameters(), pair[1].distiller.parameters(), strict=True):
        torch.testing.assert_close(p, q)  # sums may be taken in another order
    assert pair[0].skipped == pair[1].skipped == 0
    assert pair[0]._graphs._recorded


@pytest.mark.cuda
def test_step_never_waits_for_the_gpu(tiny):
    made = engine(tiny.distiller("pathways").cuda())
    batches = [tuple(x.cuda() for x in tiny.batch()) for _ in range(2)]
    made.step(*batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.step(*batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")

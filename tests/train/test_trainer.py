import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from kdfast.data import ImageSet, Stream
from kdfast.meta import Process
from kdfast.methods import KD, METHODS, MKD, Alone, DistPro
from kdfast.models import CifarResNet
from kdfast.train.checkpoint import load_checkpoint, save_checkpoint, seed_everything
from kdfast.train.loop import warmup_cosine
from kdfast.train.run import Numbered
from kdfast.train.trainer import Trainer


class Net(nn.Module):
    """Draws at random, keeps statistics, hands out features: whatever a continued training could get wrong."""

    def __init__(self):
        super().__init__()
        self.widths = (4,)
        self.conv, self.bn = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(4, 3)

    def forward(self, x, features=False):
        x = torch.relu(self.bn(self.conv(x)))
        logits = self.head(self.dropout(x).mean((2, 3)))
        return (logits, [x]) if features else logits


def images(count=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    pictures = torch.randn(count, 1, 6, 6, generator=generator) + labels[:, None, None, None]
    return ImageSet(pictures, labels)


def stream(count=24, seed=1, batch_size=4):
    return Stream(images(count), torch.zeros(1), torch.ones(1), batch_size, seed=seed, augment="crop_flip")


def trainer(kind="alone", **options):
    """Two epochs of six steps."""
    seed_everything(3)
    teacher = Net()
    distiller = {
        "alone": lambda: Alone(Net()),
        "mkd": lambda: MKD(Net(), teacher),
        "distpro": lambda: DistPro(Net(), teacher),
    }
    distiller = distiller[kind]()
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1, momentum=0.9)
    if kind != "alone":
        options["validation_batches"] = stream(10, seed=5)  # ends in the middle of an epoch
        options["meta_optimizer"] = torch.optim.Adam(distiller.meta_parameters(), lr=0.05)
    if kind == "distpro":
        options["process"] = Process(distiller.pathways)
    return Trainer(
        distiller,
        stream(),
        optimizer,
        epochs=2,
        scheduler=warmup_cosine(optimizer, 12, 0.1),
        evaluation=[images(9, seed=9)],
        **options,
    )


def halves(epoch):
    return stream(12, seed=10 + epoch, batch_size=2), stream(12, seed=20 + epoch, batch_size=3)


SETUPS = {
    "plain": {},
    "ema": {"ema": 0.8},
    "accumulated": {"accumulate": 4},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "channels last": {"channels_last": True},
    "meta": {"kind": "mkd"},
    "meta, channels last": {"kind": "mkd", "channels_last": True},
    "search": {"kind": "distpro"},
    "halves": {"kind": "mkd", "halves": halves},
}


def everything(trained):
    """What two trainings must agree in, bit for bit; times aside."""
    state = trained.state_dict()
    for record in state["history"]:
        record.pop("seconds"), record.pop("images_per_second"), record.pop("waiting")
    return state


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool((a == b) if not hasattr(a, "all") else (a == b).all())


class Stopped(Exception):
    pass


@pytest.mark.parametrize("setup", SETUPS)
def test_goes_on_bit_for_bit_from_any_step(setup, tmp_path):
    options = SETUPS[setup]
    every = {"checkpoint": tmp_path / "c.safetensors", "checkpoint_every": 1}
    reference = trainer(**options)
    reference.run()
    assert reference.step == (4 if setup == "accumulated" else 12)
    expected = everything(reference)
    for stop in range(1, reference.step):

        def interrupt(record, stop=stop):
            if record.step == stop:  # this step's checkpoint is not written
                raise Stopped

        with pytest.raises(Stopped):
            trainer(**options, callback=interrupt, **every).run()
        resumed = trainer(**options, **every)
        torch.rand(stop)  # another random state than the one to go on with
        resumed.resume(tmp_path / "c.safetensors")
        assert resumed.step == stop
        resumed.run()
        assert same(everything(resumed), expected), stop


def test_what_is_done_stays_done(tmp_path):
    path = tmp_path / "c.safetensors"
    first = trainer(checkpoint=path)
    first.run()
    again = trainer(checkpoint=path)
    again.resume(path)
    assert again.run().last.steps == 12 and again.step == 12
    assert same(everything(again), everything(first))


def test_checkpoint_of_another_training_is_one_sentence(tmp_path):
    path = save_checkpoint(tmp_path / "c.safetensors", trainer(ema=0.5).state_dict())
    with pytest.raises(ValueError, match="of a training with a ema, this one is without; build them alike"):
        trainer().resume(path)
    state = load_checkpoint(path)
    with pytest.raises(ValueError, match=r"is of 2 process\(es\), here are 1; resume with as many"):
        trainer(ema=0.5).load_state_dict({**state, "processes": state["processes"] * 2})
    state["distiller"]["student.head.weight"] = torch.zeros(5, 4)
    with pytest.raises(
        ValueError, match=r"checkpoint's distiller is another training's \(size mismatch .*build them alike"
    ):
        trainer(ema=0.5).load_state_dict(state)


def test_accumulated_batches_are_one_large_batch():
    results = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        distiller = Alone(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))
        optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1, momentum=0.9)
        data = images()
        batches = list(zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True))
        history = Trainer(distiller, batches, optimizer, epochs=3, accumulate=accumulate).run()
        results.append((distiller.student[1].weight, history.last.loss, history.last.steps))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == pytest.approx(results[1][1]) and results[0][2] == results[1][2] == 9


def test_moving_average_is_what_is_measured_and_exported():
    plain = trainer()
    weights = [plain.student.head.weight.detach().clone()]
    plain.callback = lambda record: weights.append(plain.student.head.weight.detach().clone())
    plain.run()
    averaged = trainer(ema=0.5)
    averaged.run()
    assert torch.equal(averaged.distiller.student.head.weight, plain.student.head.weight)  # training is the same
    mean = weights[1]
    for weight in weights[2:]:
        mean = 0.5 * mean + 0.5 * weight
    torch.testing.assert_close(averaged.student.head.weight, mean)
    assert not torch.equal(averaged.student.head.weight, averaged.distiller.student.head.weight)


def test_moving_average_takes_counters_over():
    averaged = trainer(ema=0.9)
    averaged.run()
    assert averaged.student.bn.num_batches_tracked == averaged.distiller.student.bn.num_batches_tracked == 12
    assert not torch.equal(averaged.student.bn.running_mean, averaged.distiller.student.bn.running_mean)


def test_channels_last_is_refused_where_it_would_damage_memory():
    narrow, wide = (CifarResNet(8, widths, in_channels=1, classes=3) for widths in ((4, 8, 8), (8, 8, 8)))
    for student, teacher, refused in ((narrow, wide, True), (wide, narrow, False)):  # teachers have no gradient
        distiller = KD(student.requires_grad_(True), teacher)
        optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1)
        sentence = r"at least 8 channels into each strided 1x1 convolution, got 4 into student\."
        with pytest.raises(ValueError, match=sentence) if refused else nullcontext():
            Trainer(distiller, stream(), optimizer, epochs=1, channels_last=True).run()
            assert teacher.stages[0][0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_loss_falls_in_low_precision():
    for precision in ("bf16", "fp16"):
        trained = trainer(precision=precision)
        assert trained.run().epochs[1].loss < trained.history.epochs[0].loss
        assert trained.student.head.weight.dtype == torch.float32


@pytest.mark.slow
def test_compiled_training_is_the_same_training():
    plain, compiled = trainer(), trainer(compile=True)
    for each in (plain, compiled):
        each.distiller.student.dropout.p = 0.0  # whose masks the compiler draws otherwise
        each.run()  # and rounds otherwise, in steps that build on each other
    assert compiled.history.last.loss == pytest.approx(plain.history.last.loss, rel=1e-4)
    assert list(compiled.student.state_dict()) == list(plain.student.state_dict())


def test_held_out_images_are_measured_told_and_choose_the_best_epoch():
    told = []
    trained = trainer(validation_batches=[images(9, seed=7)])
    trained.distiller.end_epoch = told.append
    history = trained.run()
    assert told == [record.validation_loss for record in history.epochs] and None not in told
    assert history.selected_on == "validation"
    assert history.best.validation_accuracy == max(record.validation_accuracy for record in history.epochs)
    assert trainer().history.selected_on == "test"


def test_steps_are_ordinary_while_the_method_says_so():
    trained = trainer("mkd")
    trained.distiller.meta_last_epochs = 1
    seen = []
    trained.callback = lambda record: seen.append((record.epoch, record.meta))
    trained.run()
    assert seen == [(0, False)] * 6 + [(1, True)] * 6


def test_ordinary_steps_are_clipped_as_the_meta_steps_are():
    norms = []

    def watch(optimizer, args, kwargs):
        held = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(held).item())

    torch.manual_seed(0)
    distiller = MKD(Net(), Net(), meta_last_epochs=1)
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1)
    optimizer.register_step_pre_hook(watch)
    meta = {"meta_optimizer": torch.optim.SGD(distiller.meta_parameters(), lr=0.1), "meta": {"max_norm": 1e-3}}
    Trainer(distiller, stream(), optimizer, epochs=2, validation_batches=stream(10, seed=5), **meta).run()
    assert norms == pytest.approx([1e-3] * 12, rel=1e-2)


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_methods_own_factor_multiplies_the_rate(kind):
    class Falling(Alone):
        lr_factor = 1.0

        def start_epoch(self, epoch, epochs):
            self.lr_factor = 0.5**epoch

    used = []

    class Watched(torch.optim.SGD):
        def step(self):
            used.append(float(self.param_groups[0]["lr"]))
            super().step()

    torch.manual_seed(0)
    distiller = Falling(Net())
    optimizer = Watched(distiller.inner_parameters(), lr=kind(0.2))
    decay = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9)  # builds on the rate it finds
    history = Trainer(distiller, stream(12), optimizer, epochs=2, scheduler=decay).run()
    assert [record.lr for record in history.epochs] == pytest.approx([0.2 * 0.9**3, 0.2 * 0.9**6 * 0.5])
    assert used == pytest.approx([0.2 * 0.9**step * 0.5 ** (step // 3) for step in range(6)])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epochs": 0}, "epochs must be a number of epochs of at least 1, got 0"),
        ({"evaluate_every": 0}, "evaluate_every must be a number of epochs of at least 1, got 0"),
        ({"meta": {"every": 2}}, "meta is of a meta_optimizer, got none"),
        ({"optimizer": torch.optim.SGD(Net().parameters(), 0.1)}, "The optimizer holds none of Alone's parameters"),
    ],
)
def test_what_would_do_nothing_is_refused(options, sentence):
    distiller = Alone(Net())
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(distiller.inner_parameters(), 0.1)
    with pytest.raises(ValueError, match=sentence):
        Trainer(distiller, stream(), optimizer, **{"epochs": 1, **options})


def test_the_student_is_not_its_own_teacher():
    network = Net()
    with pytest.raises(ValueError, match="teacher must be a network of its own"):
        MKD(network, network)


def with_teacher(kind):
    import inspect

    return "teacher" in inspect.signature(kind).parameters


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if with_teacher(kind)])
def test_teacher_is_in_eval_mode_and_untouched_whatever_is_done_to_it(method):
    torch.manual_seed(0)
    student, teacher = (CifarResNet(8, widths, in_channels=1, classes=3) for widths in ((2, 2, 4), (4, 4, 4)))
    before = copy.deepcopy(teacher.state_dict())
    data = Stream(images(12), torch.zeros(1), torch.ones(1), 6, seed=0)
    options = {"labels": data.data.labels, "negatives": 4} if method == "crd" else {}
    distiller = METHODS[method](student, teacher, **options)
    modes = []
    for module in teacher.modules():
        module.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    teacher.train().requires_grad_(True)
    learns = next(distiller.meta_parameters(), None) is not None
    meta = (
        {"validation_batches": data, "meta_optimizer": torch.optim.Adam(distiller.meta_parameters(), 0.1)}
        if learns
        else {}
    )
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1)
    held = {id(p) for p in teacher.parameters()}
    assert not any(id(p) in held for group in optimizer.param_groups for p in group["params"])
    Trainer(distiller, Numbered(data) if options else data, optimizer, epochs=4, **meta).run()  # for methods in phases
    assert modes and not any(modes)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


@pytest.mark.parametrize("meta", [{}, {"commit": "rehead"}, {"commit": "separate"}, {"validation": "rolling"}])
def test_process_holds_the_weights_that_the_student_was_trained_with(meta):
    searching = trainer("distpro", meta=meta)
    used, weights = [], searching.distiller.weights

    def step(closure=None, own=searching.optimizer.step):
        used.append(current[-1])
        return own(closure)

    current = []
    searching.optimizer.step = step
    weights.register_forward_hook(lambda module, inputs, result: current.append(result.detach().clone()))
    searching.run()
    recorded = searching.process.weights
    assert len(recorded) == len(used) == 12
    for mine, seen in zip(recorded, used, strict=True):
        torch.testing.assert_close(torch.as_tensor(mine), seen.to(torch.as_tensor(mine)))
    assert not torch.equal(used[0], used[-1])

"""Whole trainings from the command line, in processes of their own: killed, continued, several at once."""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from kdfast.data import Stream, load_digits
from kdfast.methods import Alone
from kdfast.train.checkpoint import load_checkpoint
from kdfast.train.recipes import default_recipe
from kdfast.train.run import Run, Settings
from kdfast.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
TINY = ("--data", "digits", "--no-tensorboard", "--set", "augment=none", "--set", "batch_size=50")
STUDENT = ("--student", "resnet8(widths=(2,2,4))")


def command(*arguments):
    return [sys.executable, "-m", "kdfast", "train", *map(str, arguments)]


def finished(*arguments):
    subprocess.run(command(*arguments), env=ENVIRONMENT, cwd=ROOT, check=True, capture_output=True, timeout=240)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher") / "run"
    finished("alone", *TINY, "--student", "resnet8(widths=(4,4,4))", "--out", out, "--epochs", 2)
    return out / "last.safetensors"


def modified(path):
    return path.stat().st_mtime_ns if path.exists() else 0


def killed_at_random(arguments, folder, kills, rng):
    """Run `arguments`, then --resume, each killed a random time after its start or its first checkpoint."""
    for kill in range(kills):
        before = modified(folder / "checkpoint.safetensors")
        process = subprocess.Popen(
            arguments, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if kill % 4 != 3:  # else anywhere, also while it starts
            while modified(folder / "checkpoint.safetensors") == before and process.poll() is None:
                time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3 if kill % 4 != 3 else 4))
        assert process.poll() is None, f"the training ended before kill {kill}: it is too short for this test"
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (folder / "settings.json").exists():
            arguments = command("--resume", folder, "--no-tensorboard")
    subprocess.run(arguments, env=ENVIRONMENT, cwd=ROOT, check=True, capture_output=True, timeout=240)


def same_trainings(one, other):
    first, second = (load_file(folder / "last.safetensors") for folder in (one, other))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    histories = [json.loads((folder / "results.json").read_text())["epochs"] for folder in (one, other)]
    for record in histories[0] + histories[1]:
        del record["seconds"], record["images_per_second"], record["waiting"]
    assert histories[0] == histories[1]
    states = [load_checkpoint(folder / "checkpoint.safetensors") for folder in (one, other)]
    for name in ("optimizer", "meta_optimizer"):
        for a, b in zip(*(state[name]["state"].values() for state in states), strict=True):
            assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)


@pytest.mark.parametrize(
    ("kills", "epochs"), [(2, 6), pytest.param(20, 60, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_killed_training_ends_as_if_never_killed(tmp_path, teacher, kills, epochs):
    common = ("mkd", *TINY, *STUDENT, "--teacher", teacher, "--epochs", epochs, "--checkpoint-every", 1)
    finished(*common, "--out", tmp_path / "whole")
    seed = int(os.environ.get("KDFAST_KILL_SEED", random.SystemRandom().randrange(2**31)))
    print(f"KDFAST_KILL_SEED={seed}")
    killed_at_random(command(*common, "--out", tmp_path / "killed"), tmp_path / "killed", kills, random.Random(seed))
    same_trainings(tmp_path / "whole", tmp_path / "killed")
    assert not [
        path for path in (tmp_path / "killed").iterdir() if path.name.startswith("checkpoint") and path.suffix == ""
    ]


def train_linear(rank, processes, file):
    """No BatchNorm, whose statistics are each process's own; every step sees the same images in all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=processes)
    data = load_digits(10).train
    stream = Stream(data, torch.zeros(1), torch.ones(1), 20 // processes, seed=0, rank=rank, world_size=processes)
    torch.manual_seed(rank)  # the first process's weights are everyone's
    distiller = Alone(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1, momentum=0.9)
    history = Trainer(distiller, stream, optimizer, epochs=3).run()
    torch.save((distiller.student[1].weight.detach(), history.last.steps), f"{file}-{rank}-of-{processes}")
    dist.destroy_process_group()
    if sys.platform == "linux":  # a thread left may abort the process at its end
        until = time.monotonic() + 10
        while any("gloo" in name for name in thread_names()):
            assert time.monotonic() < until, f"the process group outlives its end: {thread_names()}"
            time.sleep(0.01)


def thread_names():
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            names.append((task / "comm").read_text().strip())
    return names


def test_two_processes_take_the_steps_of_one(tmp_path):
    for processes in (1, 2):
        torch.multiprocessing.spawn(train_linear, (processes, tmp_path / f"meet{processes}"), nprocs=processes)
    (one, steps), (first, half), (second, _) = (
        torch.load(tmp_path / name) for name in ("meet1-0-of-1", "meet2-0-of-2", "meet2-1-of-2")
    )
    assert torch.equal(first, second) and steps == half == 15
    torch.testing.assert_close(first, one)


def test_torchrun_trains_alike(tmp_path):
    results = []
    for processes, batch_size in ((1, 40), (2, 20)):
        out = tmp_path / str(processes)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        arguments = [
            "-m", "kdfast", "train", "alone", *TINY[:-1], f"batch_size={batch_size}", *STUDENT, "--out", str(out),
            "--epochs", "2", "--set", "lr=0.02", "--device", "cpu",
        ]  # fmt: skip
        done = subprocess.run(
            [*launcher, *arguments], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("last epoch") == 1  # one process speaks
        results.append(json.loads((out / "results.json").read_text()))
    one, two = results
    assert [record["steps"] for record in one["epochs"]] == [record["steps"] for record in two["epochs"]]
    # BatchNorm sees half the images, so that the trainings are alike, not equal.
    assert two["last"]["parts"]["task"] == pytest.approx(one["last"]["parts"]["task"], rel=0.15)
    state = load_checkpoint(tmp_path / "2" / "checkpoint.safetensors")
    assert len(state["processes"]) == 2
    assert not torch.equal(state["processes"][0]["random"]["torch"], state["processes"][1]["random"]["torch"])


def test_rate_falls_in_its_epoch_although_those_on_halves_are_shorter(tmp_path):
    recipe = replace(
        default_recipe("metadistiller"),
        epochs=4,
        milestones=(3,),
        batch_size=100,
        augment="none",
        options={"meta_every_epochs": 2, "exit": "linear"},
    )
    run = Run(Settings(recipe, "digits", "resnet8(widths=(2,2,4))"), tmp_path)
    epochs = run.run()["epochs"]
    assert [record["steps"] for record in epochs] == run.ends[1:]
    assert len({b - a for a, b in itertools.pairwise(run.ends)}) == 2  # whole and half epochs
    # each record has the rate after its epoch's last step: that of the next epoch
    assert [record["lr"] for record in epochs] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    assert run.steps == run.trainer.step


def test_steps_of_halves_are_counted_as_they_are_accumulated(tmp_path):
    """The schedule is laid over this number."""
    recipe = replace(
        default_recipe("metadistiller"), epochs=2, batch_size=250, augment="none", options={"meta_every_epochs": 2}
    )
    run = Run(Settings(recipe, "digits", "resnet8(widths=(2,2,4))", accumulate=2), tmp_path)
    run.run()
    assert run.trainer.step == run.steps == run.ends[-1] == 3  # of 2 and 4 batches


def test_a_short_trial_begins_at_the_recipes_rate():
    assert default_recipe("distpro").scaled(1).milestones == (1, 1, 1)
    assert default_recipe("kd").scaled(24).milestones == (15, 18, 21)

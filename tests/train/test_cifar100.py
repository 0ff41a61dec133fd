"""Opt-in (-m slow): every method on real images; KDFAST_CIFAR100 names the folder (train/CLASS/*.png, test/...)."""

import dataclasses
import inspect
import math
import os
import statistics

import pytest
import torch

from kdfast.methods import METHODS
from kdfast.train.networks import write_student
from kdfast.train.recipes import default_recipe
from kdfast.train.run import Run, Settings

ROOT = os.environ.get("KDFAST_CIFAR100")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(ROOT is None, reason="KDFAST_CIFAR100 must name the folder of the unpacked CIFAR-100"),
]


STEPS = 500


class Enough(Exception):
    pass


def losses_of(settings, folder):
    """The loss of the first steps, and the training that took them."""
    folder.mkdir()
    losses = []

    def record(step):
        losses.append(step.loss)
        if len(losses) == STEPS:
            raise Enough

    run = Run(settings, folder, record)
    with pytest.raises(Enough):
        run.run()
    return losses, run


def falls(losses):
    """Whether the mean of the last 100 is below that of the first 100 by more than 4 of its standard errors."""
    start, end = losses[:100], losses[-100:]
    error = math.sqrt((statistics.variance(start) + statistics.variance(end)) / 100)
    print(f"{statistics.fmean(start):.4f} -> {statistics.fmean(end):.4f} ± {error:.4f} in {len(losses)} steps")
    return statistics.fmean(end) < statistics.fmean(start) - 4 * error


def settings(method, **others):
    """The method's recipe in 4 epochs, each of more steps than are taken: one of a method in phases is the first."""
    recipe = dataclasses.replace(default_recipe(method, "process" in others).scaled(4), batch_size=64, milestones=())
    if method == "reviewkd":  # its weight rises from 0 in the first epochs, of which this is one
        recipe = dataclasses.replace(recipe, options={**recipe.options, "warmup_epochs": 0})
    if method == "fitnet":  # its weight of 100 multiplies every step of the hint, which swings at the recipe's 0.05
        recipe = dataclasses.replace(recipe, lr=0.005)
    return Settings(recipe, f"folder:{ROOT}", "resnet8(widths=(4,8,16))", **others)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.set_num_threads(1)
    chosen = dataclasses.replace(settings("alone"), student="resnet8(widths=(8,16,32))")
    _, run = losses_of(chosen, tmp_path_factory.mktemp("teacher") / "run")
    about = {"network": chosen.student, "classes": 100, "shape": (3, 32, 32), "epoch": 0, "accuracy": None}
    return str(write_student(run.folder / "teacher.safetensors", run.trainer.student, about))


@pytest.mark.parametrize("method", METHODS)
def test_loss_falls_on_real_images(method, teacher, tmp_path):
    needs = {"teacher": teacher} if "teacher" in inspect.signature(METHODS[method]).parameters else {}
    losses, run = losses_of(settings(method, **needs), tmp_path / "run")
    assert falls(losses), method
    if method == "distpro":
        run.trainer.process.save(tmp_path / "process.safetensors")
        losses, _ = losses_of(
            settings(method, process=str(tmp_path / "process.safetensors"), **needs), tmp_path / "follow"
        )
        assert falls(losses)

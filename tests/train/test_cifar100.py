"""Opt-in (-m slow): every method on real images; KDFAST_CIFAR100 names the folder (train/CLASS/*.png, test/...)."""

import dataclasses
import inspect
import math
import os
import statistics

import pytest
import torch

from kdfast.methods import METHODS
from kdfast.train.recipes import default_recipe
from kdfast.train.run import Run, Settings

ROOT = os.environ.get("KDFAST_CIFAR100")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(ROOT is None, reason="KDFAST_CIFAR100 must name the folder of the unpacked CIFAR-100"),
]


def losses_of(settings, folder):
    """The loss of every step."""
    folder.mkdir()
    losses = []
    Run(settings, folder, lambda record: losses.append((record.epoch, record.loss))).run()
    return losses


def falls(losses):
    """Whether the mean of the last 20 is below that of the first 20 by more than 4 of its standard errors."""
    start, end = losses[:20], losses[-20:]
    error = math.sqrt((statistics.variance(start) + statistics.variance(end)) / 20)
    print(f"{statistics.fmean(start):.4f} -> {statistics.fmean(end):.4f} ± {error:.4f} in {len(losses)} steps")
    return statistics.fmean(end) < statistics.fmean(start) - 4 * error


def settings(method, epochs=1, **others):
    """Steps of 250 images: 200 an epoch, fewer where some are held out."""
    recipe = dataclasses.replace(
        default_recipe(method, "process" in others).scaled(epochs), batch_size=250, milestones=()
    )
    if method in ("alone", "kd"):
        recipe = dataclasses.replace(recipe, lr=0.05)
    return Settings(recipe, f"folder:{ROOT}", "resnet8(widths=(4,8,16))", **others)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("teacher") / "run"
    chosen = dataclasses.replace(settings("alone"), student="resnet8(widths=(8,16,32))")
    losses_of(chosen, folder)
    return str(folder / "last.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_loss_falls_on_real_images(method, teacher, tmp_path):
    needs = {"teacher": teacher} if "teacher" in inspect.signature(METHODS[method]).parameters else {}
    epochs = {"stagewise": 4, "born_again": 4}.get(method, 1)  # those that train in phases of whole epochs
    losses = losses_of(settings(method, epochs, **needs), tmp_path / "run")
    first = [loss for epoch, loss in losses if epoch == losses[0][0]]  # one phase: its loss is one quantity
    assert len(first) >= 90
    assert falls(first), method
    if method == "distpro":
        process = str(tmp_path / "run" / "process.safetensors")
        losses = losses_of(settings(method, process=process, **needs), tmp_path / "follow")
        assert falls([loss for _, loss in losses])

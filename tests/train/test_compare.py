import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

from kdfast.data import load_digits
from kdfast.meta import Process
from kdfast.train.compare import compare
from kdfast.train.comparison import TITLES, Recipe

# The teacher's shifted images come out channels-last: with fewer than 8 channels oneDNN would damage memory on AVX2
# (docs/limits.md).
TINY = Recipe(train_per_class=5, batch_size=25, teacher_widths=(8, 8, 8), student_widths=(2, 2, 2)).scaled(4)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    trainings = []
    result = compare(TINY, folder, seeds=(7, 8), on_run=lambda training, run: trainings.append(training))
    return result, folder, trainings


def test_each_method_and_seed_takes_the_same_steps(comparison):
    result, _, trainings = comparison
    assert list(result.runs) == list(TITLES) and result.seeds == (7, 8)
    assert all(run.steps == TINY.epochs * TINY.epoch_steps == 8 for runs in result.runs.values() for run in runs)
    searches = [run.search.steps for run in result.runs["distpro"]]
    total = sum(run.steps for runs in result.runs.values() for run in runs) + sum(searches) + result.teacher.steps
    assert total == TINY.planned_steps(tuple(TITLES), 2)
    assert len(trainings) == 1 + 2 * len(TITLES) and trainings[0] == "teacher"


def test_methods_report_what_they_learn(comparison):
    result, folder, _ = comparison
    for seed, run in zip(result.seeds, result.runs["distpro"], strict=True):
        stored = Process.load(folder / f"process-seed{seed}.safetensors")
        assert len(stored) == run.search.steps == TINY.distpro_search_epochs * TINY.epoch_steps
        assert len(run.process) == run.steps and len(run.process.pathways) == 27
        assert torch.equal(run.process.weights[-1], stored.weights[-1])
        assert not torch.equal(stored.raw[-1], torch.ones(27))  # the search moved them
        assert run.search.accuracy == []  # the search sees no evaluation image
    for run in result.runs["mkd"]:
        assert len(run.temperatures) == run.steps and len(set(run.temperatures)) > 1
    assert result.runs["kd"][0].temperatures == [(4.0, 4.0)] * 8
    assert result.runs["alone"][0].temperatures == []


def test_a_seed_repeats_whichever_other_methods_run(comparison, tmp_path):
    result = comparison[0]
    torch.manual_seed(123)  # neither does the global random state matter, nor is it changed
    state = torch.get_rng_state()
    again = compare(TINY, tmp_path, methods=("mkd", "distpro"), seeds=(7,))
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("mkd", "distpro"):
        assert again.runs[name][0].accuracy == result.runs[name][0].accuracy
    assert again.runs["mkd"][0].temperatures == result.runs["mkd"][0].temperatures
    assert torch.equal(again.runs["distpro"][0].process.weights, result.runs["distpro"][0].process.weights)


def test_processes_change_nothing(comparison, tmp_path):
    result = comparison[0]
    again = compare(TINY, tmp_path, methods=("alone", "distpro"), seeds=(7, 8), processes=2)
    for name in ("alone", "distpro"):
        assert [run.accuracy for run in again.runs[name]] == [run.accuracy for run in result.runs[name]]


def test_evaluates_on_the_part_asked_for_and_only_on_it(tmp_path, monkeypatch):
    split = load_digits(TINY.train_per_class, TINY.validation_per_class)
    poisoned = split._replace(test=split.test._replace(images=torch.full_like(split.test.images, torch.nan)))
    monkeypatch.setattr("kdfast.train.compare.load_digits", lambda *counts: poisoned)
    seen = []
    original = torch.nn.functional.conv2d

    def watched(images, *args, **kwargs):
        seen.append(bool(images.isnan().any()))
        return original(images, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    result = compare(TINY, tmp_path, methods=("alone", "distpro"), seeds=(7,), evaluate_on="validation")
    assert result.evaluated_on == "validation" and result.images["test"] == len(split.test.labels)
    assert seen and not any(seen)


def test_scaled_keeps_proportions_and_at_least_one_epoch():
    recipe = Recipe(epochs=100, teacher_epochs=200, distpro_search_epochs=25)
    scaled = recipe.scaled(20)
    assert (scaled.epochs, scaled.teacher_epochs, scaled.distpro_search_epochs) == (20, 40, 5)
    assert recipe.scaled(1).distpro_search_epochs == 1
    assert Recipe().scaled(Recipe().epochs) == Recipe()


def test_two_processes_of_torchrun_make_one_comparison(tmp_path):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kdfast"),
        *("compare", "--seeds", "1", "--epochs", "2", "--methods", "kd,distpro,metadistiller", "--out", str(tmp_path)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("KD, seed 0:") == 1  # by the first of them alone
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["methods"]) == {"kd", "distpro", "metadistiller"}
    assert Process.load(tmp_path / "process-seed0.safetensors")


def test_a_comparison_that_is_stopped_leaves_the_rest_undone(tmp_path):
    done = []

    def stopped(training, run):
        done.append(training)
        if training != "teacher":
            raise KeyboardInterrupt

    before = set(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt):
        compare(TINY, tmp_path, methods=["alone"], seeds=range(50), processes=2, on_run=stopped)
    assert done == ["teacher", done[1]]
    # Two threads that wait for one child may both overlook its end.
    for child in set(multiprocessing.active_children()) - before:
        with pytest.raises(ProcessLookupError):
            os.kill(child.pid, 0)

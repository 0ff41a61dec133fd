"""`kdfast compare` from the command line."""

import json
import os
import sys

import pytest
import torch

from kdfast.train.comparison import TITLES
from tests.test_cli import invoke

PNG = b"\x89PNG\r\n\x1a\n"


def test_compare_leaves_a_table_and_a_whole_report(tmp_path):
    out = tmp_path / "runs" / "demo"
    threads = torch.get_num_threads()
    result = invoke(
        "compare", "--data", "digits", "--out", str(out), "--seeds", "2", "--epochs", "4", "--processes", "1"
    )
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads

    results = json.loads((out / "results.json").read_text())
    assert list(results["methods"]) == list(TITLES)
    for method in results["methods"].values():
        assert len(method["accuracy"]) == 2 and all(0 <= a <= 1 for a in method["accuracy"])
        assert method["step_ms"] > 0
    assert results["settings"]["epochs"] == 4 and results["settings"]["seeds"] == [0, 1]
    for name in ("accuracy", "temperatures", "pathways"):
        assert (out / f"{name}.png").read_bytes().startswith(PNG)
    report = (out / "report.md").read_text()
    for title in TITLES.values():
        assert title in report and title in result.output
    assert (out / "process-seed0.safetensors").exists() and (out / "process-seed1.safetensors").exists()
    assert "DistPro, seed 1:" in result.output  # a line a training, where no bar can be drawn


def test_compare_runs_the_methods_named(tmp_path):
    result = invoke(
        "compare",
        "--out",
        str(tmp_path),
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--methods",
        "kd, alone,kd",
        "--processes",
        "1",
    )
    assert result.exit_code == 0, result.output
    assert list(json.loads((tmp_path / "results.json").read_text())["methods"]) == ["kd", "alone"]
    assert not list(tmp_path.glob("process-*"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--data", "cifar"), "'cifar' is not 'digits'"),
        (("--seeds", "0"), "0 is not in the range x>=1"),
        (("--epochs", "0"), "0 is not in the range x>=1"),
        (("--methods", "alone,fitnet"), "'fitnet' is none of alone, kd,"),
        (("--methods", ""), "'' is none of alone, kd,"),
        (("--epochs", "3"), "stagewise needs at least an epoch a phase, 4 in all, got 3"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path, arguments, sentence):
    result = invoke("compare", "--out", str(tmp_path), *arguments)
    assert result.exit_code in (1, 2)
    assert sentence in result.output and "Traceback" not in result.output


def test_folder_that_cannot_be_written_is_one_sentence_before_the_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = invoke("compare", "--out", str(tmp_path / "file"), "--seeds", "1", "--epochs", "1")
    assert result.exit_code == 2
    assert "cannot write into" in result.output and "name another folder" in result.output
    assert "teacher" not in result.output


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    result = invoke("compare", "--out", str(tmp_path), "--seeds", "1", "--epochs", "1")
    assert result.exit_code == 2 and "cannot write into" in result.output


def test_missing_scikit_learn_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    result = invoke("compare", "--out", str(tmp_path), "--seeds", "1", "--epochs", "1")
    assert result.exit_code == 1
    assert "pip install scikit-learn" in result.output and "Traceback" not in result.output

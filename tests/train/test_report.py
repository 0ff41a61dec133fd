import io
import json
import struct

import pytest
import torch
from rich.console import Console

from kdfast.meta import Process
from kdfast.train.comparison import Comparison, Recipe, Run
from kdfast.train.report import markdown, pathway_figure, results_dict, table, write_report

PATHWAYS = [f"s{s}-t{t}-conv{c}" for s in range(3) for t in range(3) for c in (1, 2, 3)]


def run(accuracy, step_ms, **learned):
    return Run(4, step_ms, 4e-3 * step_ms, [(2, 0.5), (4, accuracy)], **learned)


def process(seed):
    result = Process(PATHWAYS)
    for step in range(4):
        raw = torch.ones(27) + 0.2 * step * torch.arange(27) * (1 if seed else -1)
        result.record(raw.softmax(0), raw)
    return result


def comparison(**changes):
    search = Run(2, 9.0, 0.018, [])
    runs = {
        "alone": [run(0.80, 1.0), run(0.90, 3.0)],
        "kd": [run(0.88, 2.0, temperatures=[(4.0, 4.0)] * 4)] * 2,
        "mkd": [
            run(0.91, 5.0, temperatures=[(4.0, 4.0), (3.0, 5.0)]),
            run(0.93, 5.0, temperatures=[(4.0, 4.0), (3.5, 5.0)]),
        ],
        "distpro": [run(0.92, 7.0, process=process(seed), search=search) for seed in (0, 1)],
    }
    whole = Comparison(
        recipe=Recipe(),
        data="digits",
        evaluated_on="test",
        images={"train": 100, "validation": 600, "test": 1097},
        seeds=(0, 1),
        teacher=run(0.97, 2.0),
        parameters={"teacher": 1000, "student": 100},
        runs=runs,
    )
    return Comparison(**{**vars(whole), **changes})


def test_results_hold_final_accuracies_and_median_step_times():
    results = json.loads(json.dumps(results_dict(comparison())))
    assert results["methods"]["alone"]["accuracy"] == [0.80, 0.90]
    assert results["methods"]["alone"]["step_ms"] == 2.0
    assert results["methods"]["mkd"]["temperatures"] == [[3.0, 5.0], [3.5, 5.0]]
    assert results["methods"]["distpro"]["search"] == {"steps": 2, "step_ms": 9.0, "seconds": [0.018, 0.018]}
    assert results["teacher"]["accuracy"] == 0.97
    assert results["settings"]["seeds"] == [0, 1] and results["settings"]["lr"] == Recipe().lr
    assert results["machine"]["torch"] == torch.__version__


def test_table_has_mean_and_sample_deviation():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(comparison()))
    lines = console.export_text().splitlines()
    names = ("alone", "│ KD", "MKD", "DistPro")
    alone, kd, mkd, distpro = (next(line for line in lines if name in line) for name in names)
    assert "85.00 ± 7.07" in alone and " 2.0 " in alone
    assert kd.count("4.00 (fixed)") == 2
    assert "92.00 ± 1.41" in mkd and "3.25 ± 0.35" in mkd and "5.00 ± 0.00" in mkd
    assert "–" in distpro


def test_single_seed_has_no_deviation():
    one = comparison(seeds=(0,), runs={"alone": [run(0.8, 1.0)]})
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(one))
    assert "80.00" in (text := console.export_text()) and "±" not in text


def test_folder_is_written_whole_and_legible(tmp_path):
    (tmp_path / "results.json").write_text("old")
    paths = write_report(comparison(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths)  # nothing is left aside
    assert {p.name for p in paths} == {
        "accuracy.png", "temperatures.png", "pathways.png", "report.md", "results.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "results.json").read_text())["methods"]["kd"]["accuracy"] == [0.88, 0.88]
    for name in ("accuracy.png", "temperatures.png", "pathways.png"):
        png = (tmp_path / name).read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        assert png[:8] == b"\x89PNG\r\n\x1a\n" and width >= 900 and height >= 400


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("old")
    (tmp_path / "accuracy.png").write_text("old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(comparison(), tmp_path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"results.json": "old", "accuracy.png": "old"}


def test_pathway_figure_shows_each_weight_in_its_panel():
    figure = pathway_figure(comparison())
    panels = figure.axes
    assert len(panels) == 9
    weights = torch.stack([process(0).weights, process(1).weights]).mean(0)  # [steps, 27]
    for i, axes in enumerate(panels):
        assert f"student stage {i // 3 + 1}" in axes.get_title() and f"teacher stage {i % 3 + 1}" in axes.get_title()
        drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
        for c in range(3):
            assert drawn[f"conv{c + 1}"] == pytest.approx(weights[:, 3 * i + c].numpy())


def test_report_without_learning_methods_has_only_what_there_is(tmp_path):
    alone = comparison(runs={"alone": [run(0.8, 1.0), run(0.9, 1.0)]})
    assert {p.name for p in write_report(alone, tmp_path)} == {"accuracy.png", "report.md", "results.json"}
    text = (tmp_path / "report.md").read_text()
    assert "MKD" not in text and "pathways.png" not in text


def test_report_names_every_choice():
    recipe = Recipe(
        train_per_class=11, batch_size=51, weight_decay=0.123, warmup=0.17, teacher_epochs=153, epochs=149, lr=0.161,
        teacher_weight_decay=0.043, kd_alpha=0.13, kd_temperature=4.25, mkd_initial_temperature=4.125, mkd_span=2.5,
        mkd_lr=0.0031, mkd_held_out=0.12, distpro_scale=5.25, distpro_clip=0.55, distpro_lr=0.053,
        distpro_held_out=0.23, distpro_search_epochs=39,
    )  # fmt: skip
    text = markdown(comparison(recipe=recipe), ["accuracy.png"])
    for value in (
        "11 a class", "of 51", "0.123", "17%", "153 epochs", "0.043", "149 epochs", "0.161", "0.13 cross-entropy",
        "4.25", "4.125", "±1.25", "0.0031", "12% of", "5.25", "0.55", "0.053", "23% of", "39 epochs", "1,097 test",
        "1,000 parameters", "100 parameters", torch.__version__,
    ):  # fmt: skip
        assert value in text, value
    assert "92.00 ± 1.41" in text

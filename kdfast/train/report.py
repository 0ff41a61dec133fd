"""A comparison made visible: the table on the terminal, and the folder with curves, numbers and their story."""

import json
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure  # without pyplot: draws into files by Agg, keeps no global state
from rich.table import Table

from kdfast.train.compare import Comparison, Run

TITLES = {"alone": "student alone", "kd": "KD", "mkd": "MKD", "distpro": "DistPro"}
COLOURS = {"alone": "#666666", "kd": "#1f77b4", "mkd": "#d95f02", "distpro": "#1b9e77"}


def table(comparison: Comparison) -> Table:
    """Accuracy, step time and final temperatures of each method, for `rich.console.Console.print`."""
    seeds = len(comparison.seeds)
    result = Table(title=f"{comparison.data}: {comparison.evaluated_on} accuracy of the last epoch, {seeds} seed(s)")
    result.add_column("method")
    for column in COLUMNS:
        result.add_column(column, justify="right")
    for row in _rows(comparison):
        result.add_row(*row)
    return result


COLUMNS = ("accuracy %", "step ms", "τ_s at the end", "τ_t at the end")


def _rows(comparison: Comparison) -> list[tuple[str, ...]]:
    rows = []
    for name, runs in comparison.runs.items():
        temperatures = [run.temperatures[-1] for run in runs if run.temperatures]
        tau_s, tau_t = (_spread(column) for column in zip(*temperatures)) if temperatures else ("–", "–")
        accuracies = [100 * run.accuracy[-1] for run in runs]
        rows.append((TITLES[name], _spread(accuracies), f"{_step_ms(runs):.1f}", tau_s, tau_t))
    return rows


def _spread(values: Iterable[float]) -> str:
    """Mean ± sample standard deviation; the mean alone of a single value."""
    values = list(values)
    mean = statistics.fmean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def _step_ms(runs: list[Run]) -> float:
    return statistics.median(run.step_ms for run in runs)


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``results.json``, ``report.md`` and the curves into `folder`, which exists; returns the paths.

    Each file is written aside and moved into place, so that a reader finds the old one or the new one, whole.
    """
    plots = {"accuracy.png": accuracy_figure(comparison)}
    if any(run.temperatures for runs in comparison.runs.values() for run in runs):
        plots["temperatures.png"] = temperature_figure(comparison)
    if "distpro" in comparison.runs:
        plots["pathways.png"] = pathway_figure(comparison)
    paths = [
        _atomically(folder / name, lambda path, figure=figure: figure.savefig(path, dpi=120))
        for name, figure in plots.items()
    ]
    results = json.dumps(results_dict(comparison), indent=2) + "\n"
    for name, text in (("report.md", markdown(comparison, list(plots))), ("results.json", results)):
        paths.append(_atomically(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8")))
    return paths


def results_dict(comparison: Comparison) -> dict:
    """What ``results.json`` holds: ``methods`` with an accuracy in [0, 1] a seed each, ``teacher``, ``settings``."""
    methods = {}
    for name, runs in comparison.runs.items():
        entry = methods[name] = {
            "accuracy": [run.accuracy[-1] for run in runs],
            "step_ms": _step_ms(runs),
            "steps": runs[0].steps,
            "seconds": [run.seconds for run in runs],
        }
        if runs[0].temperatures:
            entry["temperatures"] = [list(run.temperatures[-1]) for run in runs]
        if runs[0].search is not None:
            entry["search"] = {
                "steps": runs[0].search.steps,
                "step_ms": _step_ms([run.search for run in runs]),
                "seconds": [run.search.seconds for run in runs],
            }
    return {
        "methods": methods,
        "teacher": {"accuracy": comparison.teacher_accuracy, "parameters": comparison.parameters["teacher"]},
        "settings": {
            "data": comparison.data,
            "evaluated_on": comparison.evaluated_on,
            "images": comparison.images,
            "seeds": list(comparison.seeds),
            "student_parameters": comparison.parameters["student"],
            **asdict(comparison.recipe),
        },
        "machine": machine(),
    }


def machine() -> dict[str, str | int]:
    """The processor and the versions that a measured number depends on."""
    processor = platform.processor() or platform.machine()
    try:  # on Linux platform.processor() knows no more than the architecture
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    except OSError:
        pass
    return {
        "processor": processor,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a file aside (of the same suffix, in the same folder), then move it to `path`."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    aside = Path(name)
    try:
        write(aside)
        aside.chmod(0o644)  # mkstemp's files are their owner's alone
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def accuracy_figure(comparison: Comparison) -> Figure:
    """Accuracy by epoch: the mean over the seeds, and a band from the lowest to the highest."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, runs in comparison.runs.items():
        curves = 100 * torch.tensor([run.accuracy for run in runs])  # [seeds, epochs]
        epochs = range(1, curves.shape[1] + 1)
        axes.plot(epochs, curves.mean(0), color=COLOURS[name], label=f"{TITLES[name]} ({curves[:, -1].mean():.1f} %)")
        axes.fill_between(epochs, curves.amin(0), curves.amax(0), color=COLOURS[name], alpha=0.15, linewidth=0)
    teacher = 100 * comparison.teacher_accuracy
    axes.axhline(teacher, color="black", linestyle=":", label=f"teacher ({teacher:.1f} %)")
    axes.set(xlabel="epoch", ylabel=f"{comparison.evaluated_on} accuracy, %")
    axes.set_title(f"{comparison.data}: mean of {len(comparison.seeds)} seed(s), band from lowest to highest")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def temperature_figure(comparison: Comparison) -> Figure:
    """The temperatures by step, one line a seed; constant where they are not learned."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle("temperatures while training, one line a seed")
    both = figure.subplots(1, 2, sharey=True)
    for which, (axes, symbol) in enumerate(zip(both, ("τ_s (student)", "τ_t (teacher)"))):
        for name, runs in comparison.runs.items():
            for i, run in enumerate(run for run in runs if run.temperatures):
                values = [step[which] for step in run.temperatures]
                axes.plot(values, color=COLOURS[name], alpha=0.8, label=TITLES[name] if i == 0 else None)
        axes.set(title=symbol, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    both[0].set_ylabel("temperature")
    return figure

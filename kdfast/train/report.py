"""A comparison made visible: the table on the terminal, and the folder with curves, numbers and their story."""

import json
import os
import platform
import statistics
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure  # without pyplot: draws into files by Agg, keeps no global state
from rich.table import Table

from kdfast.train.comparison import TITLES, Comparison, Run
from kdfast.train.files import atomically

COLUMNS = ("accuracy %", "step ms", "τ_s at the end", "τ_t at the end")
COLOURS = {
    "alone": "#666666",
    "kd": "#1f77b4",
    "at": "#9edae5",
    "reviewkd": "#8c564b",
    "mkd": "#d95f02",
    "distpro": "#1b9e77",
    "metadistiller": "#7570b3",
    "self_guidance": "#e7298a",
    "stagewise": "#e6ab02",
}


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


def _rows(comparison: Comparison) -> list[tuple[str, ...]]:
    rows = []
    for name, runs in comparison.runs.items():
        accuracies = [100 * accuracy for accuracy in _final(runs)]
        temperatures = [_temperature(runs, which) for which in (0, 1)]
        rows.append((TITLES[name], _spread(accuracies), f"{_step_ms(runs):.1f}", *temperatures))
    return rows


def _final(runs: list[Run]) -> list[float]:
    """The accuracies after the last epoch, in [0, 1], one a seed."""
    return [run.accuracy[-1][1] for run in runs]


def _temperature(runs: list[Run], which: int) -> str:
    """tau_s (0) or tau_t (1) at the end."""
    if not runs[0].temperatures:
        return "–"
    if all(step == runs[0].temperatures[0] for run in runs for step in run.temperatures):
        return f"{runs[0].temperatures[0][which]:.2f} (fixed)"
    return _spread([run.temperatures[-1][which] for run in runs])


def _spread(values: list[float]) -> str:
    """Mean ± sample standard deviation; the mean alone of a single value."""
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
        atomically(folder / name, lambda path, figure=figure: figure.savefig(path, dpi=120))
        for name, figure in plots.items()
    ]
    results = json.dumps(results_dict(comparison), indent=2) + "\n"
    for name, text in (("report.md", markdown(comparison, list(plots))), ("results.json", results)):
        paths.append(atomically(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8")))
    return paths


def results_dict(comparison: Comparison) -> dict:
    """What ``results.json`` holds: ``methods`` with an accuracy in [0, 1] a seed each, ``teacher``, ``settings``."""
    methods = {}
    for name, runs in comparison.runs.items():
        entry = methods[name] = {
            "accuracy": _final(runs),
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
        "teacher": {"accuracy": _final([comparison.teacher])[0], "parameters": comparison.parameters["teacher"]},
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


def accuracy_figure(comparison: Comparison) -> Figure:
    """Accuracy by step: the mean over the seeds, and a band from the lowest to the highest."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, runs in comparison.runs.items():
        steps = [step for step, _ in runs[0].accuracy]
        curves = 100 * torch.tensor(
            [[accuracy for _, accuracy in run.accuracy] for run in runs]
        )  # [seeds, evaluations]
        label = f"{TITLES[name]} ({curves[:, -1].mean():.1f} %)"
        axes.plot(steps, curves.mean(0), ".-", color=COLOURS[name], label=label)
        axes.fill_between(steps, curves.amin(0), curves.amax(0), color=COLOURS[name], alpha=0.15, linewidth=0)
    teacher = 100 * _final([comparison.teacher])[0]
    axes.axhline(teacher, color="black", linestyle=":", label=f"teacher ({teacher:.1f} %)")
    axes.set(xlabel="step", ylabel=f"{comparison.evaluated_on} accuracy, %")
    axes.set_title(f"{comparison.data}: mean of {len(comparison.seeds)} seed(s), band from lowest to highest")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def temperature_figure(comparison: Comparison) -> Figure:
    """The temperatures by step, one line a seed; constant where they are not learned."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle("temperatures while training, one line a seed")
    both = figure.subplots(1, 2, sharey=True)
    for which, symbol in enumerate(("τ_s (student)", "τ_t (teacher)")):
        axes = both[which]
        for name, runs in comparison.runs.items():
            for i, run in enumerate(run for run in runs if run.temperatures):
                values = [step[which] for step in run.temperatures]
                axes.plot(values, color=COLOURS[name], alpha=0.8, label=TITLES[name] if i == 0 else None)
        axes.set(title=symbol, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    both[0].set_ylabel("temperature")
    return figure


def pathway_figure(comparison: Comparison) -> Figure:
    """The pathway weights by step: a panel for each pair of features, in it a line for each transform."""
    processes = [run.process for run in comparison.runs["distpro"]]
    names = [name.split("-") for name in processes[0].pathways]  # (student feature, teacher feature, transform)
    students, teachers, transforms = (list(dict.fromkeys(column)) for column in zip(*names, strict=True))
    weights = torch.stack([process.weights for process in processes])  # [seeds, steps, pathways]
    figure = Figure(figsize=(10, 8), layout="constrained")
    figure.suptitle("DistPro's pathway weights while retraining: mean of the seeds thick, each seed thin")
    panels = figure.subplots(len(students), len(teachers), sharex=True, sharey=True, squeeze=False)
    for pathway, (student, teacher, transform) in enumerate(names):
        axes, colour = panels[students.index(student), teachers.index(teacher)], f"C{transforms.index(transform)}"
        for seed in range(len(processes)):
            axes.plot(weights[seed, :, pathway], color=colour, linewidth=0.7, alpha=0.4)
        axes.plot(weights[:, :, pathway].mean(0), color=colour, linewidth=2, label=transform)
        axes.set_title(f"student stage {int(student[1:]) + 1} → teacher stage {int(teacher[1:]) + 1}", fontsize=10)
    for axes in panels.flat:
        axes.axhline(1 / (len(names) + 1), color="black", linestyle=":", linewidth=1, label="all weights equal")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(transforms) + 1)
    for axes in panels[-1]:
        axes.set_xlabel("step")
    figure.supylabel("weight")
    return figure


def markdown(comparison: Comparison, plots: list[str]) -> str:
    """The text of ``report.md``: results, what was chosen and how, what it cost, where it ran."""
    recipe, images = comparison.recipe, comparison.images
    teacher_accuracy = 100 * _final([comparison.teacher])[0]
    shift = f"moved at random by up to {recipe.teacher_shift} pixel each way" if recipe.teacher_shift else "as they are"
    lines = [
        f"# kdfast compare: {comparison.data}",
        "",
        f"Accuracy on the {images[comparison.evaluated_on]:,} {comparison.evaluated_on} images after the last epoch "
        "(no epoch is selected),",
        f"mean ± standard deviation of seeds {', '.join(map(str, comparison.seeds))}. The teacher reaches "
        f"{teacher_accuracy:.2f} %.",
        "",
        "| method | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
        *("| " + " | ".join(row) + " |" for row in _rows(comparison)),
        "",
        *(f"![{name}]({name})\n" for name in plots),
        "## What was compared",
        "",
        "- **Images**: scikit-learn's 1,797 handwritten digits, 8x8 pixels, in one fixed split:",
        f"  {images['train']} to train on ({recipe.train_per_class} a class), {images['validation']} for choosing the "
        f"numbers below, {images['test']} to test on.",
        "  Pixels are normalised by the training images.",
        f"- **Teacher**: {_network(comparison, 'teacher')}; {recipe.teacher_epochs} epochs with weight decay "
        f"{recipe.teacher_weight_decay:g} on",
        f"  the training images, {shift}. One teacher for all students, with the first seed.",
        f"- **Student**: {_network(comparison, 'student')}; {recipe.epochs} epochs with weight decay "
        f"{recipe.weight_decay:g}",
        "  on the training images, as they are.",
        f"- **All trainings**: AdamW, learning rate {recipe.lr:g}, batches of {recipe.batch_size}, "
        f"{recipe.epoch_steps} steps an epoch; the learning",
        f"  rate rises over the first {recipe.warmup:.0%} of the steps, then falls to 0 along a cosine.",
        f"- **Equal for all students**: {recipe.epochs * recipe.epoch_steps} steps, the optimizer and its schedule,",
        "  the training images, and in each seed the initial weights.",
        "",
        "## The methods",
        "",
        *(_ABOUT[name](recipe) for name in comparison.runs),
        "",
        "## How the numbers were chosen",
        "",
        "On the validation images alone, which train nothing, with seeds 100 and up; the test images chose nothing.",
        "The setting (few images, a small student, no shifts for it) was chosen so that methods differ by more than",
        "seeds do. docs/demo.md of kdfast has the candidates and their results.",
        "",
        "## What it cost",
        "",
        "A step's time is the median over a training, then over the seeds, without data and evaluation.",
        "",
        *(f"- {line}" for line in _costs(comparison)),
        "",
        "## Where it ran",
        "",
        *(f"- {name}: {value}" for name, value in machine().items()),
        "",
        "`results.json` holds all of this as numbers, `process-seed*.safetensors` the processes DistPro's search found",
        "(`kdfast.Process.load`).",
        "",
    ]
    return "\n".join(lines)


def _network(comparison: Comparison, role: str) -> str:
    recipe = comparison.recipe
    depth, widths = {
        "teacher": (recipe.teacher_depth, recipe.teacher_widths),
        "student": (recipe.student_depth, recipe.student_widths),
    }[role]
    return f"CifarResNet-{depth} with widths {widths}, {comparison.parameters[role]:,} parameters"


def _costs(comparison: Comparison) -> list[str]:
    lines = [f"teacher: {comparison.teacher.steps} steps, {comparison.teacher.seconds:.1f} s"]
    for name, runs in comparison.runs.items():
        seconds = statistics.fmean(run.seconds for run in runs)
        lines.append(f"{TITLES[name]}: {runs[0].steps} steps of {_step_ms(runs):.1f} ms, {seconds:.1f} s a seed")
        if runs[0].search is not None:
            searches = [run.search for run in runs]
            seconds = statistics.fmean(search.seconds for search in searches)
            lines.append(
                f"{TITLES[name]}'s search, in addition: {searches[0].steps} steps of {_step_ms(searches):.1f} ms, "
                f"{seconds:.1f} s a seed"
            )
            dropped = statistics.fmean(run.process.dropped_share(comparison.recipe.distpro_clip) for run in runs)
            lines.append(f"of all pathway evaluations {dropped:.0%} were dropped while retraining")
    return lines


_ABOUT = {
    "alone": lambda recipe: "- **Student alone**: cross-entropy of the labels.",
    "kd": lambda recipe: (
        f"- **KD** (Hinton et al. 2015): {recipe.kd_alpha:g} cross-entropy + {1 - recipe.kd_alpha:g} τ² "
        f"KL(teacher || student) at τ = {recipe.kd_temperature:g}."
    ),
    "at": lambda recipe: (
        f"- **AT** (Zagoruyko and Komodakis 2017): cross-entropy of the labels + {recipe.at_weight:g} × the squared "
        "difference of\n  the attention maps, summed over 3 stages."
    ),
    "reviewkd": lambda recipe: (
        "- **ReviewKD** (Chen et al. 2021): cross-entropy of the labels + "
        f"{recipe.reviewkd_weight:g} × the review loss."
    ),
    "mkd": lambda recipe: (
        "- **MKD** (Liu et al. 2022): soft cross-entropy, without labels; τ_s and τ_t start at "
        f"{recipe.mkd_initial_temperature:g},\n  stay within ±{recipe.mkd_span / 2:g} of it, and are learned by AdamW "
        f"at {recipe.mkd_lr:g} on {recipe.mkd_held_out:.0%} of the training images,\n  which are held out: the student "
        "learns on the others only."
    ),
    "distpro": lambda recipe: (
        f"- **DistPro** (Deng et al. 2022): cross-entropy of the labels + {recipe.distpro_scale:g} × the weighted "
        "distances of\n  27 pathways (3 student stages to 3 teacher stages by 3 transforms). *Search*: "
        f"{recipe.distpro_search_epochs} epochs,\n  weights learned by Adam at {recipe.distpro_lr:g} on "
        f"{recipe.distpro_held_out:.0%} of the training images, held out. *Retrain*: the process\n  found is stored, "
        f"stretched to {recipe.epochs} epochs and followed in a new training from the initial weights\n  on all "
        f"training images, without the pathways whose raw weight is {recipe.distpro_clip:g} or less. The table\n"
        "  has the retraining; the search comes on top."
    ),
    "metadistiller": lambda recipe: (
        f"- **MetaDistiller** (Liu et al. 2020), *without a teacher*: a {recipe.metadistiller_exit} exit at each of "
        f"the first 2 stages,\n  {recipe.metadistiller_alpha:g} cross-entropy + {1 - recipe.metadistiller_alpha:g} τ² "
        f"KL(generator || exit) at τ = {recipe.metadistiller_temperature:g}; the generator is learned in\n  every "
        f"{recipe.metadistiller_every}th epoch, by Adam at {recipe.metadistiller_lr:g}: fresh random halves of the "
        "training images go to it and to the student."
    ),
    "self_guidance": lambda recipe: (
        "- **Self-Guidance** (Zheng and Peng 2022), *without a teacher*: cross-entropy of the full network and of one "
        f"with residual\n  branches left out (the last with probability {1 - recipe.self_guidance_survival:g}) + "
        f"{recipe.self_guidance_strength:g} τ² KL(full || sampled) at τ = {recipe.self_guidance_temperature:g}."
    ),
    "stagewise": lambda recipe: (
        "- **Stage by stage** (Gao et al. 2018): each of 3 stages learns the teacher's feature in turn, then the head "
        "the labels,\n  each in a quarter of the epochs, with the schedule of the learning rate anew; no loss weight."
    ),
}

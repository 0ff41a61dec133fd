"""The command line: `kdfast compare` and `kdfast backends`."""

import time
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import kdfast
from kdfast.train.compare import TITLES, Recipe, Run, compare
from kdfast.train.report import table, write_report


@click.group()
@click.version_option(kdfast.__version__)
def main() -> None:
    """Fast knowledge distillation in PyTorch, and meta-learned distillation made practical."""


@main.command()
def backends() -> None:
    """Say, op by op, which implementation runs and why another does not."""
    click.echo(kdfast.show_backends())


def _methods(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
    unknown = [name for name in names if name not in TITLES]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(TITLES)}; separate several by commas.")
    return names


def _folder(context: click.Context, parameter: click.Parameter, value: Path) -> Path:
    """Made and written to before the work begins rather than when it is done."""
    try:
        value.mkdir(parents=True, exist_ok=True)
        probe = value / ".kdfast-can-write"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise click.BadParameter(f"cannot write into {value} ({error.strerror}); name another folder.") from error
    return value


@main.command("compare")
@click.option("--data", type=click.Choice(["digits"]), default="digits", show_default=True, help="The images.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/compare"),
    show_default=True,
    callback=_folder,
    help="Folder for results.json, report.md and the curves.",
)
@click.option(
    "--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Students a method: seeds 0, 1, ..."
)
@click.option("--methods", default=",".join(TITLES), show_default=True, callback=_methods, help="Which, by commas.")
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=Recipe().epochs,
    show_default=True,
    help="Epochs of the students; the teacher's and the search's change in proportion.",
)
def compare_command(data: str, out: Path, seeds: int, methods: tuple[str, ...], epochs: int) -> None:
    """Train a teacher, then students alone and by each method, and report how they compare."""
    console = Console()
    recipe = Recipe().scaled(epochs)
    start = time.perf_counter()
    threads = torch.get_num_threads()
    # Networks this small are slower on two threads than on one, and their step times come in scheduler ticks.
    torch.set_num_threads(1)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    try:
        with progress:
            task = progress.add_task("starting", total=recipe.planned_steps(methods, seeds))

            def on_run(training: str, run: Run) -> None:  # also where no bar can be drawn
                progress.console.print(f"{training}: {100 * run.accuracy[-1][1]:.2f} % after {run.steps} steps")

            comparison = compare(
                recipe,
                out,
                methods=methods,
                seeds=range(seeds),
                on_step=lambda training: progress.update(task, advance=1, description=training),
                on_run=on_run,
            )
            progress.update(task, description="writing the report")
            paths = write_report(comparison, out)
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    finally:
        torch.set_num_threads(threads)
    console.print(table(comparison))
    console.print(f"{time.perf_counter() - start:.0f} s; {', '.join(path.name for path in paths)} are in {out}/")


if __name__ == "__main__":
    main()

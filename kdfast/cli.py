"""The command line: `kdfast train`, `export`, `compare`, `recipes`, `models` and `backends`."""

import ast
import dataclasses
import os
import tempfile
import time
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file

import kdfast
from kdfast.data import LOADERS
from kdfast.data.streams import usable
from kdfast.methods import METHODS
from kdfast.models import create, names
from kdfast.train import distributed
from kdfast.train.compare import compare
from kdfast.train.comparison import TITLES, Recipe, Run
from kdfast.train.files import atomically
from kdfast.train.networks import read_student, write_onnx
from kdfast.train.progress import Watch
from kdfast.train.recipes import RECIPES, as_rows, changed, default_recipe
from kdfast.train.recipes import Recipe as TrainingRecipe
from kdfast.train.run import CHECKPOINT, SETTINGS, Settings
from kdfast.train.run import Run as Training
from kdfast.train.trainer import PRECISIONS


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
        with tempfile.TemporaryFile(dir=value):  # of its own for each process of torchrun
            pass
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
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=os.cpu_count() or 1,
    show_default="one a core",
    help="In how many the students are trained.",
)
def compare_command(data: str, out: Path, seeds: int, methods: tuple[str, ...], epochs: int, processes: int) -> None:
    """Train a teacher, then students alone and by each method, and report how they compare.

    Under torchrun every training is all its processes', on the CPU.
    """
    from kdfast.train.report import table, write_report  # not above: matplotlib would slow every command's start

    distributed.start(torch.device("cpu"))
    first = distributed.rank() == 0
    processes = processes if distributed.world_size() == 1 else 1
    console = Console(quiet=not first)
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
                steps = run.steps + (run.search.steps if run.search else 0)
                progress.update(task, advance=steps, description=training)
                progress.console.print(f"{training}: {100 * run.accuracy[-1][1]:.2f} % after {run.steps} steps")

            comparison = compare(
                recipe,
                out,
                methods=methods,
                seeds=range(seeds),
                processes=processes,
                on_run=on_run,
            )
            progress.update(task, description="writing the report")
            paths = write_report(comparison, out) if first else []
    except (ImportError, ValueError, OSError) as error:
        raise click.ClickException(_sentence(error)) from error
    finally:
        torch.set_num_threads(threads)
        distributed.stop()
    console.print(table(comparison))
    console.print(f"{time.perf_counter() - start:.0f} s; {', '.join(path.name for path in paths)} are in {out}/")


@main.command()
@click.argument("name", type=click.Choice(list(RECIPES)), required=False, metavar="[NAME]")
def recipes(name: str | None) -> None:
    """List the recipes of the papers, or every number of one."""
    if name is None:
        for known, recipe in RECIPES.items():
            click.echo(f"{known}: {recipe.source}")
    else:
        _print_rows(as_rows(RECIPES[name]))


@main.command()
@click.option("--classes", type=click.IntRange(min=1), default=100, show_default=True, help="Of the last layer.")
def models(classes: int) -> None:
    """List the networks, their parameters and the channels of their features."""
    rows = []
    for name in names():
        with torch.device("meta"):  # counted, not made
            network = create(name, classes)
        rows.append((name, f"{sum(p.numel() for p in network.parameters()):>11,}  {network.widths}"))
    _print_rows(rows)


def _print_rows(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:{width}}  {value}")


def _changed(recipe: TrainingRecipe, changes: tuple[str, ...]) -> TrainingRecipe:
    """The recipe with NAME=VALUE of its own fields, or else of its method's options."""
    for change in changes:
        name, sign, text = change.partition("=")
        if not sign:
            raise click.BadParameter(f"--set needs NAME=VALUE, got {change!r}.")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text  # a word
        try:
            recipe = changed(recipe, name.strip(), value)
        except ValueError as error:
            raise click.UsageError(f"--set {change}: {error}") from error
    return recipe


def _sentence(error: Exception) -> str:
    """What went wrong, without the number of an operating system's error but with its file."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}."


@main.command(
    "train",
    help=f"Train a student by METHOD, which is one of {', '.join(METHODS)}; under torchrun, in several processes.",
)
@click.argument("method", type=click.Choice(list(METHODS)), required=False, metavar="METHOD")
@click.option("--data", help="digits, cifar10:ROOT, cifar100:ROOT, folder:ROOT or tiny-imagenet:ROOT.")
@click.option("--loader", type=click.Choice(LOADERS), default="auto", show_default=True, help="Back end of the data.")
@click.option("--workers", type=click.IntRange(min=0), help="Threads or processes a loader; by default one a core.")
@click.option("--size", type=click.IntRange(min=1), help="Pixels that images in files are resized to; by default 224.")
@click.option("--download", is_flag=True, help="Fetch CIFAR where it is not there.")
@click.option(
    "--variants", type=click.IntRange(min=1), help="Augmentations of an image that recur; by default none do."
)
@click.option("--cache-teacher", type=click.Path(), metavar="FOLDER", help="Keep the teacher's outputs there.")
@click.option("--student", help="NAME, NAME(option=value, ...), or FILE.safetensors to begin from.")
@click.option(
    "--teacher", help="The file of a trained network, or NAME=FILE, or a pretrained timm:NAME(pretrained=True)."
)
@click.option("--student-layers", help="L1,L2,...: layers of a torchvision or timm student that are its features.")
@click.option("--teacher-layers", help="The same of the teacher.")
@click.option("--recipe", "recipe_name", type=click.Choice(list(RECIPES)), help="Of a paper; by default the method's.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for all that the training leaves.")
@click.option("--resume", type=click.Path(path_type=Path), help="Folder of a training to go on with; no other options.")
@click.option("--epochs", type=click.IntRange(min=1), help="Milestones of the recipe move in proportion.")
@click.option(
    "--set", "changes", multiple=True, metavar="NAME=VALUE", help="Another number of the recipe or the method."
)
@click.option("--process", type=click.Path(), help="DistPro: follow this process instead of searching one.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all random numbers.")
@click.option(
    "--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True, help="cpu or cuda."
)
@click.option(
    "--precision", type=click.Choice(list(PRECISIONS)), default="fp32", show_default=True, help="bf16, fp16: autocast."
)
@click.option("--accumulate", type=click.IntRange(min=1), default=1, show_default=True, help="Batches a step.")
@click.option("--ema", type=float, help="Decay of a moving average of the student, which is then exported.")
@click.option("--channels-last", is_flag=True, help="Memory layout of networks and images.")
@click.option("--compile", "compile_", is_flag=True, help="torch.compile student and teacher.")
@click.option(
    "--on-broken", type=click.Choice(["stop", "skip"]), default="stop", show_default=True, help="Broken images."
)
@click.option("--broken-limit", type=click.IntRange(min=1), default=100, show_default=True, help="Skipped at most.")
@click.option("--evaluate-every", type=click.IntRange(min=1), default=1, show_default=True, help="Epochs.")
@click.option("--checkpoint-every", type=click.IntRange(min=1), help="Steps; by default each epoch.")
@click.option("--tensorboard/--no-tensorboard", default=True, show_default=True, help="Curves in OUT/tensorboard.")
def train_command(
    method: str | None,
    data: str | None,
    student: str | None,
    recipe_name: str | None,
    out: Path | None,
    resume: Path | None,
    epochs: int | None,
    changes: tuple[str, ...],
    device: str,
    compile_: bool,
    tensorboard: bool,
    **others,
) -> None:
    folder = resume or out
    try:
        if resume is not None:
            _nothing_beside_resume()
            settings = Settings.load(resume)
            distributed.start(_device(settings.device))
            if not (folder / CHECKPOINT).exists():
                click.echo(f"{folder} has no checkpoint yet: its training begins anew.")
        else:
            distributed.start(_device(device))
            needed = {"METHOD": method, "--data": data, "--student": student, "--out": out}
            if missing := [name for name, value in needed.items() if not value]:
                raise click.UsageError(f"A training needs {', '.join(missing)}; or --resume and its folder.")
            recipe = RECIPES[recipe_name] if recipe_name else default_recipe(method, bool(others["process"]))
            if recipe.method != method:
                raise click.UsageError(f"The recipe {recipe_name} is of {recipe.method}, not of {method}.")
            recipe = _changed(recipe.scaled(epochs) if epochs else recipe, changes)
            settings = Settings(recipe, data, student, device=device, compile=compile_, **others)
            if (folder / CHECKPOINT).exists():
                raise click.UsageError(
                    f"{folder} holds a training already; go on with --resume {folder}, or name another --out."
                )
            _folder(click.get_current_context(), None, folder)
        settings = dataclasses.replace(settings, device=str(_device(settings.device)))
        first = distributed.rank() == 0
        console = Console(quiet=not first)
        if first:
            _print_rows(
                [(name, str(value)) for name, value in dataclasses.asdict(settings).items() if name != "recipe"]
            )
            _print_rows(as_rows(settings.recipe))
        _train(settings, folder, console, tensorboard and first)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        raise click.ClickException(_sentence(error)) from error
    except KeyboardInterrupt:
        if folder is None or not (folder / SETTINGS).exists():
            raise
        kept = "from its last checkpoint" if (folder / CHECKPOINT).exists() else "anew, as there is no checkpoint yet"
        click.echo(f"\nStopped. kdfast train --resume {folder} goes on {kept}.", err=True)
        raise click.exceptions.Exit(130) from None  # as a shell reports it
    finally:
        distributed.stop()


def _nothing_beside_resume() -> None:
    """A training goes on as it was begun: what would be ignored is refused."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name) is click.core.ParameterSource.COMMANDLINE
        if given and parameter.name not in ("resume", "tensorboard"):
            name = "METHOD" if isinstance(parameter, click.Argument) else parameter.opts[0]
            raise click.UsageError(f"--resume goes on with the settings of its folder; leave out {name}.")


def _device(name: str) -> torch.device:
    """The device of this name; of several processes on GPUs each takes its own."""
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = usable(name)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def _train(settings: Settings, folder: Path, console: Console, tensorboard: bool) -> None:
    watch: list[Watch] = []
    training = Training(
        settings, folder, lambda record: watch[0].step(record), lambda record: watch[0].epoch(record), console.print
    )
    trainer = training.trainer
    with Watch(console, training.steps, folder / "tensorboard" if tensorboard else None, trainer.step) as started:
        watch.append(started)
        results = training.run()
    for which in ("best", "last"):
        record = results[which]
        if record is not None and record["accuracy"] is not None:
            chosen = f", chosen on {results['best_selected_on']} images" if which == "best" else ""
            console.print(
                f"{which} epoch{chosen}: {record['epoch'] + 1}, {100 * record['accuracy']:.2f} % of the test images"
            )
    console.print(f"best.safetensors, last.safetensors and results.json are in {folder}/")


@main.command()
@click.argument("trained", type=click.Path(path_type=Path))
@click.option(
    "--which", type=click.Choice(["best", "last"]), default="last", show_default=True, help="Epoch, of a folder."
)
@click.option("--out", type=click.Path(path_type=Path), help="Safetensors file of the bare student's state.")
@click.option("--onnx", type=click.Path(path_type=Path), help="ONNX file of the student.")
def export(trained: Path, which: str, out: Path | None, onnx: Path | None) -> None:
    """Write the bare student of TRAINED, a folder of kdfast train or a student's file."""
    if out is None and onnx is None:
        raise click.UsageError("Name at least one of --out and --onnx.")
    try:
        network, weights, about = read_student(trained / f"{which}.safetensors" if trained.is_dir() else trained)
        if out is not None:
            atomically(out, lambda aside: save_file(weights, aside, {"format": "pt"}))
        if onnx is not None:
            write_onnx(onnx, network, tuple(about["shape"]))
    except (ValueError, OSError, ImportError) as error:
        raise click.ClickException(_sentence(error)) from error
    accuracy = "not measured" if about["accuracy"] is None else f"{100 * about['accuracy']:.2f} % of the test images"
    click.echo(f"{about['network']}, {about['classes']} classes, epoch {about['epoch'] + 1}: {accuracy}")


if __name__ == "__main__":
    main()

"""The documentation holds: links, paths, commands and names exist, its code runs, its numbers were measured."""

import inspect
import itertools
import re
import shlex
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import kdfast
from benchmarks import tables
from kdfast._torchvision import import_module
from kdfast.cli import _changed, main
from kdfast.data import loaders
from kdfast.models import CifarResNet, create
from kdfast.models import names as names_of_networks
from kdfast.train.loop import ordinary_step
from kdfast.train.recipes import RECIPES, default_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
RESULTS = ROOT / "benchmarks" / "results"


def page_names(page):
    return str(page.relative_to(ROOT))


def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_links_and_paths_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if not link.startswith("http"):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    for path in re.findall(r"`((?:kdfast|tests|benchmarks|docs|examples|csrc|\.ci)/[\w./]+)(?:::(\w+))?[`\s]", text):
        assert (ROOT / path[0]).exists(), path
        assert path[1] in (ROOT / path[0]).read_text() if path[1] else True, path
    for target in re.findall(r"`make (\w+)|^ +make (\w+)", text, flags=re.MULTILINE):
        name = target[0] or target[1]
        assert re.search(rf"^{name}:|PHONY:.*\b{name}\b", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), name
    for name in re.findall(r"`kdfast\.(\w+)(?:\.(\w+))?(?:\.(\w+))?", text):
        found = kdfast
        for part in filter(None, name):
            found = getattr(found, part, None) or __import__(f"{found.__name__}.{part}", fromlist=["x"])


def commands():
    """(page, words) of every `kdfast ...` in an indented block or in backticks."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        lines = re.findall(r"^    (?:torchrun .* -m )?(kdfast [^#\n]*)", text, flags=re.MULTILINE)
        lines += re.findall(r"`(kdfast [a-z][^`]*)`", text)
        for line in lines:
            yield page, shlex.split(line.replace("...", ""))


def test_commands_and_their_options_exist():
    count = 0
    for page, (_, name, *words) in commands():
        assert name in main.commands, (page, name)
        known = {option for parameter in main.commands[name].params for option in parameter.opts}
        for option in (word for word in words if word.startswith("--")):
            assert option in known, (page, option)
        method = next((word for word in words[:1] if word in kdfast.METHODS), "alone")
        for option, value in itertools.pairwise(words):
            if option == "--recipe":
                assert value in RECIPES
            if option == "--set":
                _changed(default_recipe(method), (value,))
        count += 1
    assert count > 15


@pytest.mark.parametrize("page", [page for page in PAGES if "--set" in page.read_text()], ids=page_names)
def test_numbers_to_set_exist(page):
    for name in re.findall(r"--set '?(\w+)=", page.read_text()):
        assert name == "NAME" or any(name in vars(recipe) for recipe in RECIPES.values()), name


def test_training_page_has_the_recipes_numbers():
    text = (ROOT / "docs/training.md").read_text()
    rows = re.findall(r"^\| (`[\w`, -]+`) \| (\d+) \| (\d+) \| (?:SGD) ([\d.]+)", text, flags=re.MULTILINE)
    listed = {name: numbers for names, *numbers in rows for name in re.findall(r"[\w-]+", names)}
    assert set(listed) == set(RECIPES)
    for name, (epochs, batch_size, lr) in listed.items():
        recipe = RECIPES[name]
        assert (recipe.epochs, recipe.batch_size, recipe.lr) == (int(epochs), int(batch_size), float(lr)), name


def test_models_page_has_the_networks_numbers():
    text = (ROOT / "docs/models.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ([\d,]+) \| ([\d, ]+) \|", text, flags=re.MULTILINE)
    assert [name for name, *_ in rows] == names_of_networks()
    small = [row for row in rows if int(row[1].replace(",", "")) < 300_000]  # tests/models/test_zoo.py has the others
    for name, parameters, widths in small:
        network = create(name, 100)
        assert sum(p.numel() for p in network.parameters()) == int(parameters.replace(",", "")), name
        assert network.widths == tuple(map(int, widths.split(","))), name


# ---------------------------------------------------------------- code
def python_blocks():
    for page in PAGES:
        if page.name != "README.md":  # tests/test_readme.py has its own
            for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)):
                yield pytest.param(page.name, block, id=f"{page.name}-{number}")


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the blocks take as given, small."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    streams = loaders("digits", batch_size=8, validation=0.5)
    batches = [(x, y) for _, (x, y) in zip(range(2), streams.train, strict=False)]

    def network(*widths):
        return CifarResNet(8, widths, in_channels=1)

    def digits(spec, **options):  # in place of a download
        inspect.signature(loaders).bind(spec, **options)
        return streams

    monkeypatch.setattr("kdfast.data.loaders", digits)
    student = network(4, 4, 8)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    return {
        "kdfast": kdfast, "torch": torch, "itertools": itertools, "ordinary_step": ordinary_step, "create": create,
        "student": student, "teacher": network(8, 8, 8), "network": network(4, 4, 8), "fresh_student": network(4, 4, 8),
        "distiller": kdfast.Alone(student), "optimizer": optimizer, "scheduler": None,
        "streams": Few(streams), "images": batches[0][0], "epochs": 4, "loader": batches, "train_loader": batches,
        "validation_loader": batches, "search": zip(batches, batches, strict=True), "training": batches, "steps": 2,
        "random_halves": lambda data, seed: (batches, batches), "data": None, "train_labels": streams.train.labels,
    }  # fmt: skip


class Few:
    """Streams cut short."""

    def __init__(self, streams):
        self.train = list(itertools.islice(iter(streams.train), 2))
        self.validation, self.test, self.shape = self.train, self.train, streams.shape


@pytest.mark.parametrize(("page", "block"), list(python_blocks()))
def test_code_runs(page, block, names):
    if "torchvision" in block:
        try:
            import_module("torchvision.models")  # also where its compiled operators do not load
        except ImportError as error:
            pytest.skip(str(error))
        names["images"] = torch.randn(2, 3, 32, 32)
        if "load_file" in block:
            save_file(create("torchvision:resnet18", 100).state_dict(), "student.safetensors")
    exec(compile(block, page, "exec"), names)


# ---------------------------------------------------------------- numbers
def rows(heading, page):
    """The cells of the table below a header row."""
    table = (ROOT / page).read_text().split(heading, 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]


def shown(value, text):
    """The number in `text`, whose last digit may be rounded either way."""
    digits = len(text.partition(".")[2])
    return abs(value - float(text.replace(",", ""))) <= 0.501 * 10**-digits


@pytest.mark.parametrize("file", sorted(RESULTS.glob("?pu-*.json")), ids=lambda file: file.stem)
def test_tables_are_what_was_measured(file):
    page = (ROOT / "docs" / "measured.md").read_text()
    for table in tables.tables(file):
        assert f"{tables.origin(file)} ({file.name}):\n\n{table}" in page


def test_readme_kernels_are_what_was_measured():
    files = [file for file in RESULTS.glob("cpu-*.json") if "avx2" not in file.name]
    found = {op: cases for file in files for (op, _), cases in tables.groups(file).items()}
    names = {"kd_loss": "kd_kl", "its second order": "kd_kl_hvp", "topk_kd_loss": "kd_kl_topk"}
    names |= {"exits_kd_loss": "kd_kl_exits", "pathway_loss": "pathways"}
    lines = rows("| | cases |", "README.md")
    assert len(lines) == len(names) + 3
    for name, number, *cells in lines:
        cases = found[names.get(name.strip("`"), name.strip("`"))]
        assert int(number) == len(cases), name
        for rival, (mean, worst) in {"eager": cells[:2], "compile": cells[2:]}.items():
            ratios = tables.ratios(cases, rival)
            assert ratios or (mean, worst) == ("–", "–"), name
            if ratios:
                assert shown(statistics.geometric_mean(ratios), mean) and shown(min(ratios), worst), name


def test_readme_steps_are_what_was_measured():
    (cases,) = tables.groups(RESULTS / "cpu-meta_step.json").values()
    found = {name: row for group in cases.values() for name, row in group.items()}
    for name, ms, paper, plain, error in rows("| step | ms | / the papers' |", "README.md"):
        seconds, info = found[name.strip("`")]
        assert shown(1e3 * seconds, ms) and shown(info["times_paper"], paper), name
        assert shown(info["times_plain_kd"], plain), name
        errors = info["errors"] or [None]
        assert error == ("–" if errors[0] is None else f"{100 * errors[0]:.2g} %"), name


def test_loader_sentences_are_what_was_measured():
    (cases,) = tables.groups(RESULTS / "cpu-data.json").values()
    cifar, jpegs = ({name: seconds for name, (seconds, _) in group.items()} for group in cases.values())
    for page in ("README.md", "docs/data.md"):
        text = " ".join((ROOT / page).read_text().split())
        resident, dali = re.search(r"resident ([\d.]+) × .*? DALI ([\d.]+) × ", text).groups()
        assert shown(cifar["plain"] / cifar["resident"], resident), page
        assert shown(jpegs["plain"] / jpegs["dali"], dali), page

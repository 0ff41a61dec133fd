import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from kdfast.cli import _device as device_here
from kdfast.cli import main
from kdfast.meta import Process
from kdfast.models import CifarResNet


def invoke(*arguments):
    return CliRunner().invoke(main, arguments, catch_exceptions=False)


def test_backends_prints_what_runs():
    result = invoke("backends")
    assert result.exit_code == 0 and "kd_kl" in result.output


SMALL = ("--data", "digits", "--no-tensorboard", "--set", "augment=none", "--epochs", "1")
STUDENT = ("--student", "resnet8(widths=(2,2,4))")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of a teacher, a searched process, and a student that followed it, each with the command line alone."""
    folder = tmp_path_factory.mktemp("trained")
    teacher = ("--student", "resnet8(widths=(4,4,4))")
    commands = [
        ("alone", *SMALL, *teacher, "--out", folder / "teacher"),
        ("distpro", *SMALL, *STUDENT, "--teacher", folder / "teacher/last.safetensors", "--out", folder / "search"),
        # Another pair: the student is wider; the pathways are the same.
        ("distpro", *SMALL, "--student", "resnet8(widths=(4,4,8))", "--teacher", folder / "teacher/best.safetensors",
         "--process", folder / "search/process.safetensors", "--out", folder / "retrained"),
    ]  # fmt: skip
    for command in commands:
        result = invoke("train", *map(str, command))
        assert result.exit_code == 0, result.output
    return folder


def test_train_leaves_students_results_and_every_number(trained):
    for name in ("teacher", "search", "retrained"):
        results = json.loads((trained / name / "results.json").read_text())
        assert results["last"]["epoch"] == 0 and 0 <= results["best"]["accuracy"] <= 1
        assert results["best_selected_on"] == "test"
        assert results["settings"] == json.loads((trained / name / "settings.json").read_text())
        assert {"lr", "weight_decay", "milestones", "source"} <= set(results["settings"]["recipe"])
        assert {path.name for path in (trained / name).glob("*.safetensors")} >= {
            "best.safetensors", "last.safetensors", "checkpoint.safetensors",
        }  # fmt: skip
    process = Process.load(trained / "search/process.safetensors")
    assert len(process) == json.loads((trained / "search/results.json").read_text())["last"]["steps"]
    assert not torch.equal(process.raw[0], process.raw[-1])
    followed = Process.load(trained / "retrained/followed.safetensors")
    assert torch.equal(followed.weights, process.weights)


def test_train_prints_every_number_and_both_epochs(tmp_path):
    result = invoke("train", "alone", *SMALL, *STUDENT, "--set", "lr=0.0123", "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    for text in (
        "0.0123",
        "weight_decay",
        "precision",
        "last epoch: 1",
        "best epoch, chosen on test images: 1",
        "images/s",
    ):
        assert text in result.output, text


def test_train_writes_curves_for_tensorboard(tmp_path):
    arguments = [argument for argument in SMALL if argument != "--no-tensorboard"]
    result = invoke("train", "alone", *arguments, *STUDENT, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss/task", "images/s", "accuracy/test", "learning rate"} <= set(events.Tags()["scalars"])


def test_export_writes_the_bare_state_and_onnx(trained, tmp_path):
    out, onnx = tmp_path / "bare.safetensors", tmp_path / "student.onnx"
    result = invoke("export", str(trained / "retrained"), "--out", str(out), "--onnx", str(onnx))
    assert result.exit_code == 0, result.output
    network = CifarResNet(8, (4, 4, 8), in_channels=1)
    network.load_state_dict(load_file(out))
    session = pytest.importorskip("onnxruntime").InferenceSession(onnx, providers=["CPUExecutionProvider"])
    images = torch.randn(3, 1, 8, 8)
    (logits,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), network.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("kd",), "A training needs --data, --student, --out"),
        (("kd", *SMALL, *STUDENT), "kd needs a teacher; train one with 'kdfast train alone'"),
        (("kd", *SMALL, *STUDENT, "--teacher", "resnet20"), "The teacher resnet20 has no trained weights"),
        (("alone", *SMALL, *STUDENT, "--teacher", "resnet20"), "alone takes no teacher, got resnet20"),
        (("alone", *SMALL, *STUDENT, "--set", "scale=1"), "Neither the recipe nor alone has a 'scale'"),
        (("alone", *SMALL, *STUDENT, "--set", "lrr=0.1"), "has a 'lrr' (did you mean lr?)"),
        (
            ("alone", *SMALL, *STUDENT, "--set", "lr=fast"),
            "--set lr=fast: lr must be a number of at least 0, got 'fast'",
        ),
        (("alone", *SMALL, *STUDENT, "--set", "optimizer=adam"), "optimizer must be one of sgd, adamw, got 'adam'"),
        (("alone", *SMALL, *STUDENT, "--set", "schedule=step"), "one of steps, cosine, constant, got 'step'"),
        (
            ("alone", *SMALL, *STUDENT, "--set", "milestones=1"),
            "milestones must be epochs such as (150, 180, 210), got 1",
        ),
        (("alone", *SMALL, *STUDENT, "--set", "epochs=0"), "epochs must be a whole number of at least 1, got 0"),
        (("alone", *SMALL, *STUDENT, "--set", "nesterov=maybe"), "nesterov must be True or False, got 'maybe'"),
        (("alone", *SMALL, *STUDENT, "--set", "meta={'evry': 5}"), "meta must be options of kdfast.MetaKD (tangent,"),
        (("alone", *SMALL, *STUDENT, "--set", "task_loss=x"), "nor alone has a 'task_loss'"),
        (("alone", *SMALL, *STUDENT, "--set", "meta_optimizer=adam"), "alone learns no meta-parameters"),
        (("kd", *SMALL, *STUDENT, "--set", "temperature=hot"), "temperature must be a number, got 'hot'"),
        (
            ("alone", *SMALL, *STUDENT, "--device", "gpu"),
            "device must be one that this torch can use here, got 'gpu'",
        ),
        (("alone", *SMALL, "--student", "resnet8(wdths=(2,2,2))"), "resnet8 cannot be made with these options"),
        (("alone", *SMALL, "--student", "resnet8(classes=3)"), "resnet8 cannot be made with these options"),
        (("alone", *SMALL, "--student", "."), "is a folder; name a file in it, as last.safetensors"),
        (("alone", *SMALL, *STUDENT, "--set", "lr"), "--set needs NAME=VALUE, got 'lr'"),
        (("alone", *SMALL, *STUDENT, "--recipe", "kd-cifar100"), "kd-cifar100 is of kd, not of alone"),
        (("alone", *SMALL, *STUDENT, "--process", "x"), "Only distpro follows a process"),
        (("alone", "--data", "nothing", *STUDENT), "got 'nothing'"),
        (("alone", *SMALL, *STUDENT, "--ema", "2"), "ema must be a decay in (0, 1), got 2.0"),
        (("alone", *SMALL, *STUDENT, "--set", "lr=1e30"), "is not finite"),
    ],
)
def test_trainings_that_cannot_be_are_one_sentence(tmp_path, arguments, sentence):
    out = () if arguments == ("kd",) else ("--out", str(tmp_path / "run"))
    result = invoke("train", *arguments, *out)
    assert result.exit_code in (1, 2)
    assert sentence in " ".join(result.output.split()) and "Traceback" not in result.output


def spoil(path, content):
    whole = path.read_bytes()
    path.write_bytes(content(whole))
    return path


@pytest.mark.parametrize("file", ["checkpoint.safetensors", "settings.json"])
def test_spoilt_training_is_one_sentence_and_stays_as_it_is(trained, tmp_path, file):
    folder = tmp_path / "copy"
    shutil.copytree(trained / "teacher", folder)
    spoil(folder / file, lambda whole: whole[: len(whole) // 2])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = invoke("train", "--resume", str(folder), "--no-tensorboard")
    assert result.exit_code == 1 and "use another copy" in result.output and "Traceback" not in result.output
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_training_is_never_overwritten(trained):
    before = (trained / "teacher/checkpoint.safetensors").read_bytes()
    result = invoke("train", "alone", *SMALL, *STUDENT, "--out", str(trained / "teacher"))
    assert result.exit_code == 2 and "holds a training already; go on with --resume" in " ".join(result.output.split())
    assert (trained / "teacher/checkpoint.safetensors").read_bytes() == before
    assert "no settings.json" in invoke("train", "--resume", str(trained)).output


def test_stagewise_takes_its_own_schedule_by_that_name(trained, tmp_path):
    """The recipe has a field of this name as well; the value says whose it is."""
    arguments = (
        "train", "stagewise", "--data", "digits", "--no-tensorboard", "--set", "augment=none", *STUDENT, "--teacher",
        str(trained / "teacher/last.safetensors"), "--epochs", "4", "--set", "schedule=(1, 1, 1)",
        "--out", str(tmp_path / "run"),
    )  # fmt: skip
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    recipe = json.loads((tmp_path / "run/settings.json").read_text())["recipe"]
    assert (recipe["schedule"], recipe["options"]) == ("constant", {"schedule": [1, 1, 1]})


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (("kd",), "METHOD"),
        (("--epochs", "9"), "--epochs"),
        (("--set", "lr=1"), "--set"),
        (("--device", "cpu"), "--device"),
    ],
)
def test_nothing_is_ignored_beside_resume(trained, more, name):
    before = (trained / "teacher/checkpoint.safetensors").read_bytes()
    result = invoke("train", *more, "--resume", str(trained / "teacher"), "--no-tensorboard")
    assert result.exit_code == 2 and f"leave out {name}." in " ".join(result.output.split())
    assert (trained / "teacher/checkpoint.safetensors").read_bytes() == before


def test_finished_training_is_resumed_to_the_same_files(trained, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(trained / "teacher", folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = invoke("train", "--resume", str(folder), "--no-tensorboard")
    assert result.exit_code == 0 and "last epoch: 1" in result.output
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_settings_of_another_version_are_one_sentence(trained, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(trained / "teacher", folder)
    settings = json.loads((folder / "settings.json").read_text())
    for change in ({"option_to_come": 1}, {"recipe": {**settings["recipe"], "method": "method_to_come"}}):
        (folder / "settings.json").write_text(json.dumps({**settings, **change}))
        result = invoke("train", "--resume", str(folder), "--no-tensorboard")
        assert result.exit_code == 1 and "to_come" in result.output and result.output.count("Error") == 1


def test_each_process_takes_its_own_gpu_also_when_it_goes_on(monkeypatch):
    taken = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("kdfast.cli.usable", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert device_here("cuda:0") == torch.device("cuda", 1) == taken[0]  # the first process wrote cuda:0
    assert device_here("cpu") == torch.device("cpu")


def test_stopped_by_hand_says_how_to_go_on(tmp_path, monkeypatch):
    def stopped(self, record):
        raise KeyboardInterrupt

    monkeypatch.setattr("kdfast.train.progress.Watch.epoch", stopped)
    arguments = ("train", "alone", *SMALL[:-2], *STUDENT, "--epochs", "2", "--checkpoint-every", "2")
    result = invoke(*arguments, "--out", str(tmp_path / "run"))
    assert result.exit_code == 130
    said = " ".join(result.output.split())
    assert f"kdfast train --resume {tmp_path / 'run'} goes on from its last checkpoint" in said.replace("\n", " ")
    monkeypatch.undo()
    assert invoke("train", "--resume", str(tmp_path / "run"), "--no-tensorboard").exit_code == 0


def test_help_starts_without_what_it_does_not_need():
    loaded = "import sys, kdfast.cli; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.split()
    assert not {"matplotlib", "sklearn", "scipy", "torchvision", "timm", "tensorboard", "onnx"} & set(modules)


def test_spoilt_processes_are_one_sentence(trained, tmp_path):
    whole = (trained / "search/process.safetensors").read_bytes()
    edited = Process.load(trained / "search/process.safetensors")
    edited.raw[0, 0] = torch.nan
    edited.save(tmp_path / "edited.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "foreign.safetensors").write_bytes((trained / "teacher/last.safetensors").read_bytes())
    for name, sentence in (
        ("cut", "cannot be read as a process"),
        ("edited", "it was edited"),
        ("foreign", "must be a file of Process.save"),
        ("missing", "there is no such file"),
    ):
        result = invoke(
            "train", "distpro", *SMALL, *STUDENT, "--teacher", str(trained / "teacher/last.safetensors"),
            "--process", str(tmp_path / f"{name}.safetensors"), "--out", str(tmp_path / "run"),
        )  # fmt: skip
        assert result.exit_code == 1 and sentence in " ".join(result.output.split()), result.output
        assert not (tmp_path / "run/checkpoint.safetensors").exists()


def test_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    result = invoke("train", "alone", *SMALL, *STUDENT, "--out", str(tmp_path))
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "could not be written (No space left on device); nothing was left there." in " ".join(result.output.split())


@pytest.fixture
def images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(4):
                image.new("RGB", (8, 8), (30 * i, 90, 200)).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_broken_images_and_too_few_classes_are_one_sentence(images, tmp_path):
    arguments = ("train", "alone", "--data", f"folder:{images}", *SMALL[2:], *STUDENT, "--set", "batch_size=2")
    (images / "train/cat/2.png").write_bytes(b"no image")
    result = invoke(*arguments, "--out", str(tmp_path / "run"))
    assert result.exit_code == 1 and "cannot be read as an image" in result.output
    result = invoke(*arguments, "--out", str(tmp_path / "run"), "--on-broken", "skip")
    assert result.exit_code == 0, result.output
    shutil.rmtree(images / "train/dog")
    result = invoke(*arguments, "--out", str(tmp_path / "run2"))
    assert result.exit_code == 1 and "at least two classes, got 1" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--device", "gpu"), "device must be one that this torch can use here, got 'gpu'"),
        (("--set", "batch_size=many"), "batch_size must be a whole number of at least 1, got 'many'"),
        (("--set", "held_out=half"), "held_out must be a number in [0, 1), got 'half'"),
        (("--set", "augment=5"), "augment must be a word such as none or crop_flip, got 5"),
    ],
)
def test_impossible_options_of_the_data_are_one_sentence(tmp_path, options, sentence):
    result = invoke("train", "alone", *SMALL, *STUDENT, "--out", str(tmp_path / "run"), *options)
    assert result.exit_code in (1, 2) and sentence in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output


def test_recipes_are_listed_with_their_sources():
    result = invoke("recipes")
    assert result.exit_code == 0 and "distpro-cifar100-search: Deng et al." in result.output
    assert "0.05" in invoke("recipes", "mkd-cifar100").output

"""Feature methods with torchvision's and timm's networks from the command line, and the bare networks they export."""

import json
import random

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from kdfast._torchvision import import_module
from kdfast.cli import main

COMMON = ("--no-tensorboard", "--set", "augment=none", "--epochs", "1", "--device", "cpu")


def invoke(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    image = pytest.importorskip("PIL.Image")
    root, noise = tmp_path_factory.mktemp("images"), random.Random(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(4):
                image.frombytes("RGB", (32, 32), noise.randbytes(3 * 32**2)).save(root / part / name / f"{i}.png")
    return ("--data", f"folder:{root}", *COMMON, "--set", "batch_size=4", "--set", "lr=0.001")  # two steps an epoch


@pytest.fixture(scope="module")
def teacher(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    result = invoke("train", "alone", *images, "--student", "timm:resnet10t", "--out", out)
    assert result.exit_code == 0, result.output
    return ("--teacher", out / "last.safetensors", "--teacher-layers", "layer1, layer2,layer3")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("distpro", ("--set", "held_out=0.5")),
        ("reviewkd", ()),
        ("at", ("--ema", "0.5")),
        ("stagewise", ("--epochs", "4")),  # one for each of three stages, one for the head
    ],
)
def test_torchvision_student_learns_from_a_timm_teacher(images, teacher, tmp_path, method, options):
    student = ("--student", "torchvision:shufflenet_v2_x0_5", "--student-layers", "stage2,stage3,stage4")
    result = invoke("train", method, *images, *options, *student, *teacher, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "run/results.json").read_text())["settings"]
    assert settings["student_layers"] == "stage2,stage3,stage4"
    again = invoke("train", "--resume", tmp_path / "run", "--no-tensorboard")
    assert again.exit_code == 0, again.output

    file = tmp_path / "student.safetensors"
    result = invoke("export", tmp_path / "run", "--out", file)
    assert result.exit_code == 0 and "torchvision:shufflenet_v2_x0_5, 2 classes" in result.output
    plain = import_module("torchvision.models").shufflenet_v2_x0_5(num_classes=2)
    plain.load_state_dict(load_file(file))
    assert torch.isfinite(plain.eval()(torch.randn(1, 3, 32, 32))).all()


def test_wrong_or_missing_layers_are_one_sentence(images, teacher, tmp_path):
    for student, sentence in (
        (
            ("--student-layers", "stage2,stage33"),
            "A ShuffleNetV2 has no layer 'stage33'; it has stage3, stage4, stage2",
        ),
        ((), "wrap it in kdfast.models.Tapped with the layers to use (--student-layers on the command line)"),
        (("--student-layers", "stage2"), "pairs features, so student and teacher must have as many, got 1 and 3"),
    ):
        result = invoke(
            "train", "at", *images, "--student", "torchvision:shufflenet_v2_x0_5", *student, *teacher, "--out",
            tmp_path / "run",
        )  # fmt: skip
        assert result.exit_code == 1 and sentence in " ".join(result.output.split()), result.output
    result = invoke(
        "train", "alone", *images, "--student", "resnet8", "--teacher-layers", "layer1", "--out", tmp_path / "run"
    )
    assert result.exit_code == 1 and "alone takes no teacher, got layer1; leave it out" in result.output


def test_models_are_listed_with_their_parameters():
    result = invoke("models")
    assert result.exit_code == 0
    (line,) = (line for line in result.output.splitlines() if line.startswith("wrn_40_2 "))
    assert line.split()[1] == "2,255,156" and line.endswith("(32, 64, 128)")
    assert "2,243,546" in invoke("models", "--classes", "10").output

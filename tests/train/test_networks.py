import pytest
import torch
from safetensors.torch import load_file, save_file

from kdfast._torchvision import import_module
from kdfast.models import CifarResNet
from kdfast.train.networks import bare_name, network_of, read_student, write_onnx, write_student

TEXT = "resnet8(widths=(2, 4, 4))"
ABOUT = {"network": TEXT, "classes": 5, "shape": (1, 8, 8), "epoch": 0, "accuracy": 0.5}
DATA = {"classes": 5, "in_channels": 1}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return CifarResNet(8, (2, 4, 4), in_channels=1, classes=5)


def same(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_written_student_comes_back_by_its_file(tmp_path, network):
    path = write_student(tmp_path / "s.safetensors", network, ABOUT)
    assert same(network_of(str(path), **DATA, trained=True), network)
    again, weights, about = read_student(path)
    assert same(again, network) and about["accuracy"] == 0.5 and weights.keys() == network.state_dict().keys()
    assert load_file(path).keys() == network.state_dict().keys()  # the model's own names, for any program


def test_weights_of_another_program_go_into_a_named_network(tmp_path, network):
    path = tmp_path / "theirs.safetensors"
    save_file(network.state_dict(), path)
    assert same(network_of(f"{TEXT}={path}", **DATA, trained=True), network)
    fresh = network_of(TEXT, **DATA)
    assert fresh.widths == (2, 4, 4) and not same(fresh, network)


def test_bare_name_is_what_makes_the_network(tmp_path, network):
    path = write_student(tmp_path / "s.safetensors", network, ABOUT)
    assert bare_name(TEXT) == bare_name(f"{TEXT}=x.safetensors") == bare_name(str(path)) == TEXT
    assert bare_name("resnet20=y.safetensors") == bare_name("resnet20") == "resnet20"


@pytest.mark.parametrize(
    ("description", "sentence"),
    [
        ("resnet9000x", "must be one of resnet8, .*got 'resnet9000x'"),
        ("resnet8(widths)", r"NAME\(option=value, ...\), got 'resnet8\(widths\)'"),
        ("resnet8(widths=open('x'))", r"NAME\(option=value, ...\)"),
        ("resnet8(widths=(2,", r"NAME\(option=value, ...\)"),
        ("missing.safetensors", "must be a kdfast student, but there is no such file"),
        ("resnet8=missing.safetensors", "cannot be read as a safetensors file of weights"),
    ],
)
def test_what_is_no_network_is_one_sentence(description, sentence):
    with pytest.raises(ValueError, match=sentence):
        network_of(description, **DATA)


def test_unfit_teachers_are_one_sentence(tmp_path, network):
    with pytest.raises(ValueError, match="The teacher resnet20 has no trained weights"):
        network_of("resnet20", **DATA, trained=True)
    path = write_student(tmp_path / "s.safetensors", network, ABOUT)
    with pytest.raises(ValueError, match="of 5 classes and 1 channels, the data has 10 and 3"):
        network_of(str(path), classes=10, in_channels=3, trained=True)
    with pytest.raises(ValueError, match="has not the weights of a CifarResNet of this shape"):
        network_of(f"resnet20={path}", **DATA, trained=True)


def test_exported_student_is_loaded_by_torchvision_and_timm_alone(tmp_path):
    for name, make in (
        (
            "torchvision:shufflenet_v2_x0_5",
            lambda: import_module("torchvision.models").shufflenet_v2_x0_5(num_classes=5),
        ),
        ("timm:resnet10t", lambda: import_module("timm").create_model("resnet10t", num_classes=5)),
    ):
        network = network_of(name, classes=5, in_channels=3)
        path = write_student(tmp_path / "s.safetensors", network, {**ABOUT, "network": name, "shape": (3, 32, 32)})
        theirs = make()
        theirs.load_state_dict(load_file(path))
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(theirs.eval()(images), network.eval()(images))


def test_onnx_gives_the_same_logits_for_any_batch_size(tmp_path, network):
    onnxruntime = pytest.importorskip("onnxruntime")
    network.train()
    network(torch.randn(8, 1, 8, 8))  # statistics that matter
    path = write_onnx(tmp_path / "s.onnx", network, (1, 8, 8))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        images = torch.randn(count, 1, 8, 8)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), network.eval()(images), rtol=1e-4, atol=1e-5)

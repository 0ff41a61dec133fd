"""Networks by a description on the command line, and students as files that plain PyTorch loads."""

import ast
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.models import create
from kdfast.train.files import atomically, read_tensors, write_tensors

KIND = "kdfast student 1"
ONEDNN_BLOCK = 8  # fp32 numbers in a vector of AVX2, where it was seen


def network_of(description: str, *, classes: int, in_channels: int, trained: bool = False) -> nn.Module:
    """A network from what the command line calls it.

    Args:
        description: ``NAME`` or ``NAME(option=value, ...)`` of `kdfast.models.create`; or the ``.safetensors`` file
            of a student that kdfast trained; or ``NAME=FILE`` with the weights of any other program.
        classes, in_channels: of the data.
        trained: whether it must come with weights, as a teacher does.

    Raises:
        ValueError: for what cannot be made or read, or is made for other data; one sentence.

    Example:
        >>> network_of("resnet8(widths=(8, 16, 16))", classes=10, in_channels=1)
    """
    name, file = _name_and_file(description)
    if name and Path(name).is_dir():
        raise ValueError(f"{name} is a folder; name a file in it, as {Path(name) / 'last.safetensors'}.")
    if name:
        plain, options = _parsed(name)
        given = any(options.get(option) for option in ("pretrained", "weights", "checkpoint_path"))
        if trained and not file and not given:
            raise ValueError(
                f"The teacher {description} has no trained weights; name the file of one that 'kdfast train alone' "
                f"trained, or {plain}=FILE.safetensors."
            )
    if not file:
        return _created(plain, classes, in_channels, options)
    if name:
        network, weights = _created(plain, classes, in_channels, options), foreign_weights(Path(file))
    else:
        network, weights, about = read_student(Path(file))
        if (about["classes"], about["shape"][0]) != (classes, in_channels):
            raise ValueError(
                f"{file} is a network of {about['classes']} classes and {about['shape'][0]} channels, the data has "
                f"{classes} and {in_channels}."
            )
    _load(network, weights, file)
    return network


def read_student(path: Path) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """A fresh network, its weights, and what `write_student` noted about them.

    Raises:
        ValueError: for a file that is no student of kdfast, or was changed; one sentence.
    """
    weights, about = read_tensors(path, KIND)
    plain, options = _parsed(about["network"])
    options.pop("pretrained", None)  # its weights are in the file
    options.pop("weights", None)
    network = _created(plain, about["classes"], about["shape"][0], options)
    _load(network, weights, path)
    return network, weights, about


def write_student(path: Path, network: nn.Module, about: dict[str, Any]) -> Path:
    """The bare network's state under its own names, which `safetensors.torch.load_file` gives back."""
    return write_tensors(path, network.state_dict(), KIND, about)


def write_onnx(path: Path, network: nn.Module, shape: tuple[int, int, int]) -> Path:
    """The network in eval mode as an ONNX model: "images" [batch, *shape] to "logits", of any batch size.

    Raises:
        ImportError: without onnx and onnxscript, naming the command that installs them.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"ONNX export needs {error.name}, which is not installed; run: pip install onnx onnxscript"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's exporter warns of itself
        program = torch.onnx.export(
            network.eval(),
            (torch.zeros(2, *shape),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    return atomically(path, lambda aside: program.save(aside))


def to_channels_last(network: nn.Module) -> None:
    """Give the network's convolutions the channels-last memory layout.

    Raises:
        ValueError: for a network whose gradient oneDNN, which PyTorch has on the CPU, would write past its memory in
            (github.com/uxlfoundation/oneDNN/issues/6035: strided 1x1 convolutions of fewer channels than a vector).
    """
    for name, module in network.named_modules():
        if (
            isinstance(module, nn.Conv2d)
            and module.weight.device.type == "cpu"
            and module.kernel_size == (1, 1)
            and max(module.stride) > 1
            and module.in_channels < ONEDNN_BLOCK
        ):
            raise ValueError(
                f"channels_last on the CPU needs at least {ONEDNN_BLOCK} channels into each strided 1x1 convolution, "
                f"got {module.in_channels} into {name}, where PyTorch's gradient would damage memory; leave "
                "channels_last out, or take a wider network."
            )
    network.to(memory_format=torch.channels_last)


def foreign_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file of any program."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file of weights ({error}).") from error


def _created(name: str, classes: int, in_channels: int, options: dict[str, Any]) -> nn.Module:
    """`create`, whose failures, of three libraries, become one sentence."""
    try:
        return create(name, classes, in_channels, **options)
    except (TypeError, RuntimeError, KeyError) as error:  # an option it has not; a name that timm has not
        first = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(f"{name} cannot be made with these options ({first}).") from error


def _load(network: nn.Module, weights: dict[str, Tensor], file: Any) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).split("\n")[1].strip()
        raise ValueError(
            f"{file} has not the weights of a {type(network).__name__} of this shape ({first})."
        ) from error


def bare_name(description: str) -> str:
    """``NAME`` or ``NAME(option=value, ...)`` of a description, without the file of its weights."""
    name, file = _name_and_file(description)
    return name or read_tensors(Path(file), KIND)[1]["network"]


def _name_and_file(description: str) -> tuple[str, str]:
    """The parts of ``NAME=FILE``, ``NAME(...)=FILE``, ``NAME`` and ``FILE.safetensors``; what is missing is empty."""
    end = description.rfind(")") + 1
    name, _, file = description[end:].partition("=")
    if not end and not file and name.endswith(".safetensors"):
        return "", name
    return description[:end] + name, file


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of ``NAME(option=value, ...)``."""
    name, bracket, rest = text.partition("(")
    if not bracket:
        return name, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise SyntaxError
        return name, {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"A network must be NAME or NAME(option=value, ...), got {text!r}.") from error

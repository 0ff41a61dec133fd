"""Files that a reader finds whole or not at all, and safetensors files that are checked before they are used."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a file aside (of the same suffix, in the same folder), then move it to `path`.

    The file is on the disk before it is moved, and the move before this returns: after a power cut too, a reader
    finds the old file or the new one, whole.

    Raises:
        OSError: where it cannot be written, for example on a full disk; one sentence. `path` is then as it was.
    """
    aside = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
        aside = Path(name)
        write(aside)
        aside.chmod(0o644)  # mkstemp's files are their owner's alone
        _sync(aside)
        aside.replace(path)
        _sync(path.parent)
    except OSError as error:
        kept = "the file that was there is untouched" if path.exists() else "nothing was left there"
        raise OSError(error.errno, f"{path} could not be written ({error.strerror or error}); {kept}.") from error
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)
    return path


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: object) -> Path:
    """`value` as indented JSON."""
    text = json.dumps(value, indent=2) + "\n"
    return atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: dict[str, Tensor], kind: str, about: object) -> Path:
    """Write a safetensors file with its `kind`, a JSON value `about` it, and a SHA-256 of both and the tensors."""
    from safetensors.torch import save

    tensors = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    text = json.dumps(about)
    content = save(tensors, {"format": kind, "about": text, "sha256": digest(tensors, text)})
    return atomically(path, lambda aside: aside.write_bytes(content))


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], object]:
    """The tensors and the JSON value of a file of `write_tensors`; nothing in it is ever run.

    Raises:
        ValueError: for a file that is missing, cut short, changed, or of another kind; one sentence.
    """
    from safetensors import SafetensorError, safe_open

    name = kind.rsplit(" ", 1)[0]
    if not path.is_file():
        raise ValueError(f"{path} must be a {name}, but there is no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                found = metadata.get("format", "another program's safetensors file")
                raise ValueError(f"{path} must be a {name} (format {kind!r}), got {found!r}.")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as a {name}: it is cut short or another program's ({error}); use another copy."
        ) from error
    text = metadata.get("about", "")
    if metadata.get("sha256") != digest(tensors, text):
        raise ValueError(f"{path} was changed after it was written (its checksum differs); use another copy.")
    return tensors, json.loads(text)


def digest(tensors: dict[str, Tensor], text: str) -> str:
    """SHA-256 of a text and of the names, types, shapes and values of tensors."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        if x.numel():
            sha.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()

import errno
import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kdfast.train import files
from kdfast.train.checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state

STATE = {
    "step": 7,
    "rate": 0.1,
    "nothing": None,
    "name": "x",
    "betas": (0.9, 0.999),
    "state": {0: {"step": torch.tensor(3.0), "buffer": torch.randn(2, 3)}, 1: [True, float("inf")]},
    "bits": np.array([2**32 - 1, 5], dtype=np.uint32),
    "half": torch.randn(4).bfloat16(),
    "empty": torch.empty(0, 3),
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b and type(a) is type(b)


def test_gives_back_what_it_was_given(tmp_path):
    shared = torch.arange(4)
    state = {**STATE, "twice": [shared, shared]}
    save_checkpoint(tmp_path / "c.safetensors", state)
    assert same(load_checkpoint(tmp_path / "c.safetensors"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_random_states_of_every_library_continue(tmp_path):
    path = save_checkpoint(tmp_path / "c.safetensors", random_state())

    def draws():
        return (
            random.random(),
            float(np.random.rand()),
            float(np.random.randn()),
            float(torch.rand(())),
            random.gauss(0, 1),
        )

    first = draws()
    set_random_state(load_checkpoint(path))
    assert draws() == first


def test_another_number_of_gpus_is_one_sentence():
    state = {**random_state(), "cuda": [torch.zeros(1)] * (torch.cuda.device_count() + 1)}
    with pytest.raises(ValueError, match=r"GPU\(s\), here are .*resume with as many"):
        set_random_state(state)


def test_holds_no_objects(tmp_path):
    with pytest.raises(TypeError, match="holds tensors, numbers, strings, lists and dicts, got a object at /a/0"):
        save_checkpoint(tmp_path / "c.safetensors", {"a": [object()]})
    assert not list(tmp_path.iterdir())


def spoilt(content: bytes, how: str) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    if how == "cut":
        return content[: len(content) // 2]
    if how == "header cut":
        return content[:20]
    if how == "empty":
        return b""
    if how == "pickle":
        return b"\x80\x02}q\x00."
    if how == "tensor":
        return content[:-1] + bytes([content[-1] ^ 1])
    header["__metadata__"]["about"] = header["__metadata__"]["about"].replace("7", "8", 1)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize("how", ["cut", "header cut", "empty", "pickle", "tensor", "number"])
def test_spoilt_file_is_one_sentence(tmp_path, how):
    path = save_checkpoint(tmp_path / "c.safetensors", STATE)
    path.write_bytes(spoilt(path.read_bytes(), how))
    changed = how in ("tensor", "number")
    sentence = "was changed after it was written" if changed else "cannot be read as a kdfast checkpoint"
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(path)


def test_foreign_and_missing_files_are_one_sentence(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r'must be a kdfast checkpoint .*got "another program\'s safetensors file"'):
        load_checkpoint(tmp_path / "other.safetensors")
    files.write_tensors(tmp_path / "s.safetensors", {}, "kdfast student 1", {})
    with pytest.raises(ValueError, match=r"must be a kdfast checkpoint .*got 'kdfast student 1'"):
        load_checkpoint(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="there is no such file"):
        load_checkpoint(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("at", ["write", "sync"])
def test_full_disk_leaves_the_old_file_and_says_so(tmp_path, monkeypatch, at):
    path = save_checkpoint(tmp_path / "c.safetensors", {"step": 1})

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    if at == "write":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        OSError, match=r"could not be written \(No space left on device\); the file that was there"
    ) as info:
        save_checkpoint(path, {"step": 2})
    assert info.value.errno == errno.ENOSPC
    assert load_checkpoint(path) == {"step": 1} and len(list(tmp_path.iterdir())) == 1


def test_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(files, "_sync", lambda path: order.append(("sync", path)))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: order.append(("move", self)) or replace(self, to))
    save_checkpoint(tmp_path / "c.safetensors", {})
    aside = order[0][1]
    assert order == [("sync", aside), ("move", aside), ("sync", tmp_path)] and aside.parent == tmp_path

"""Checkpoints: any nesting of dicts, lists, numbers and tensors in one safetensors file, and the random states.

The tensors are the file's tensors; what they are nested in is JSON in its header. Nothing is pickled, so a file from
elsewhere can be wrong but can run nothing.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.train.files import read_tensors, write_tensors

KIND = "kdfast checkpoint 1"


def save_checkpoint(path: Path, state: dict[str, Any]) -> Path:
    """Write `state` to `path`: on the disk before it replaces what was there.

    Args:
        path: the file; its folder exists.
        state: dicts (keys: strings or integers), lists, tuples, numbers, strings, None, tensors, NumPy arrays.

    Raises:
        TypeError: for anything else in it.
        OSError: where it cannot be written; the file that was there is untouched.
    """
    tensors: dict[str, Tensor] = {}
    tree = _taken_apart(state, tensors, "")
    return write_tensors(Path(path), tensors, KIND, tree)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        ValueError: for a file that is missing, cut short, changed, or no checkpoint.
    """
    tensors, tree = read_tensors(Path(path), KIND)
    return _put_together(tree, tensors)


def _taken_apart(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """JSON that says how `value` is nested; its tensors go to `tensors`, by their place."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, np.ndarray):  # its bits, as PyTorch has few unsigned types
        tensors[name] = torch.from_numpy(value.view(value.dtype.str.replace("u", "i")))
        return {"array": name, "dtype": value.dtype.str}
    if isinstance(value, (list, tuple)):
        items = [_taken_apart(item, tensors, f"{name}/{i}") for i, item in enumerate(value)]
        return {"list": items} if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
        return {"dict": [[key, _taken_apart(item, tensors, f"{name}/{key}")] for key, item in value.items()]}
    raise TypeError(
        f"A checkpoint holds tensors, numbers, strings, lists and dicts, got a {type(value).__name__} at {name}."
    )


def _put_together(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "array" in tree:
        return tensors[tree["array"]].numpy().view(tree["dtype"])
    if "dict" in tree:
        return {key: _put_together(item, tensors) for key, item in tree["dict"]}
    items = [_put_together(item, tensors) for item in next(iter(tree.values()))]
    return tuple(items) if "tuple" in tree else items


def random_state() -> dict[str, Any]:
    """Of every library that draws in a training: Python, NumPy, PyTorch on the CPU and on each GPU."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Continue from a `random_state`.

    Raises:
        ValueError: where it was taken with another number of GPUs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) != gpus:
        raise ValueError(
            f"The checkpoint was written with {len(state['cuda'])} GPU(s), here are {gpus}; resume with as many."
        )
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if gpus:
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python, NumPy and PyTorch; the processes of one training draw differently."""
    seed += 1_000_003 * rank
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)

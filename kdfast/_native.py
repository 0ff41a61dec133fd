"""Loads the compiled kernels, if they were built; keeps the reason if not."""

import contextlib
import importlib
import warnings
from pathlib import Path
from types import ModuleType

import torch

failure: str | None = None
build_info: dict[str, str] = {}

try:
    from kdfast import _C  # registers the kernels
except ImportError as error:
    note = Path(__file__).parent / "_build_failure.txt"
    failure = note.read_text().strip() if note.exists() else f"kdfast._C does not load ({error})"
    warnings.warn(
        f"kdfast runs in plain PyTorch, without compiled kernels: {failure}. Reinstall with a C++ compiler "
        "to have them, under KDFAST_REQUIRE_NATIVE=1 to see a failing build.",
        UserWarning,
        stacklevel=2,
    )
else:
    build_info = _C.build_info()

# Torch's C++ autograd has no stable ABI: beside another torch than it was built with, this module could do anything.
autograd: ModuleType | None = None
if build_info.get("torch") == torch.__version__:
    with contextlib.suppress(ImportError):  # its work is then done in Python, slower
        autograd = importlib.import_module("kdfast._C_autograd")


def has_kernel(op: str, device: str) -> bool:
    """Whether a kernel of our own is registered for the op on "CPU" or "CUDA"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"kdfast::{op}", device)

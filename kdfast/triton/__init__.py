"""Triton kernels: what runs on a GPU where the compiled CUDA kernels are not built.

Importing this package needs neither triton nor a GPU; the kernels are imported by the first call on a CUDA tensor.
"""

import importlib
import importlib.util

import torch

MODULES = {"kd_kl": "kdfast.triton.kd_kl", "kd_kl_backward": "kdfast.triton.kd_kl"}  # op -> where its kernel stands
registered: set[str] = set()  # the ops Triton runs on CUDA tensors


def register() -> None:
    """Makes Triton the CUDA kernel of every op that has none yet. Call it once the compiled kernels are loaded."""
    if not installed():
        return
    from kdfast.ops.kd_kl import LIB

    for name in MODULES:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"kdfast::{name}", "CUDA"):
            LIB.impl(name, _launcher(name), "CUDA")
            registered.add(name)


def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def status() -> str:
    """What Triton does here, and why it does no more: one sentence."""
    if not installed():
        return "not installed; `pip install triton` for GPU kernels without nvcc"
    if not registered:
        return "installed, and not used: the compiled CUDA kernels come first"
    return f"runs {', '.join(sorted(registered))} on CUDA tensors"


def _launcher(name: str):
    def launch(*args):
        return getattr(importlib.import_module(MODULES[name]), name)(*args)

    return launch

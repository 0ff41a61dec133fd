"""Triton kernels: what runs on a GPU where the compiled CUDA kernels are not built.

Importing this package needs neither triton nor a GPU; the first call on a CUDA tensor imports the kernels.
"""

import importlib
import importlib.util

import torch

# op -> the module its kernel stands in
MODULES = {
    "kd_kl": "kdfast.triton.kd_kl",
    "kd_kl_backward": "kdfast.triton.kd_kl",
    "kd_kl_hvp": "kdfast.triton.kd_kl_hvp",
    "kd_kl_topk": "kdfast.triton.kd_kl_topk",
    "kd_kl_topk_backward": "kdfast.triton.kd_kl_topk",
    "incorrect_brier": "kdfast.triton.incorrect_brier",
    "incorrect_brier_backward": "kdfast.triton.incorrect_brier",
    "pathways": "kdfast.triton.pathways",
    "pathways_backward": "kdfast.triton.pathways",
    "pathways_value_and_grad": "kdfast.triton.pathways",
}
registered: set[str] = set()  # the ops Triton runs on CUDA tensors


def register() -> None:
    """Makes Triton the CUDA kernel of every op that has none yet. Call it after loading the compiled ones."""
    if not installed():
        return
    from kdfast.ops.kd_kl import LIB

    for name, module in MODULES.items():
        # Defines the op. Compiled kernels alone would have made its name known; without them it is not.
        importlib.import_module(module.replace("kdfast.triton.", "kdfast.ops."))
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

"""Triton kernels: what runs on a GPU where the compiled CUDA kernels are not built.

Importing this package needs neither triton nor a GPU; the kernels are imported by the first call on a CUDA tensor.
"""

import importlib.util

import torch


def register() -> str:
    """Makes Triton the CUDA kernel of every op that has no compiled one. Call it after the native library is loaded.

    Returns:
        "" if the Triton kernels were registered, else a sentence saying why they were not.
    """
    if torch._C._dispatch_has_kernel_for_dispatch_key("kdfast::kd_kl", "CUDA"):
        return "a CUDA kernel is already registered."
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed; pip install triton."
    from kdfast.ops.kd_kl import LIB

    LIB.impl("kd_kl", _kd_kl, "CUDA")
    LIB.impl("kd_kl_backward", _kd_kl_backward, "CUDA")
    return ""


def _kd_kl(*args):
    from kdfast.triton.kd_kl import kd_kl

    return kd_kl(*args)


def _kd_kl_backward(*args):
    from kdfast.triton.kd_kl import kd_kl_backward

    return kd_kl_backward(*args)

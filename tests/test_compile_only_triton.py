"""Triton kernels where there is no GPU: what the launchers choose compiles for every architecture without spilling."""

import os
import re
import subprocess

import pytest
import torch

import kdfast.triton
from tests.ops import kd_kl_hvp_cases as hvp
from tests.ops import kd_kl_topk_cases as topk
from tests.ops.kd_kl_cases import make
from tests.test_compile_only import ARCHITECTURES, _Driver


def launch_hvp(kernels):
    chosen = [case for case in hvp.CASES if case.classes >= 1000] + hvp.CASES[1:20:4]  # the widest tiles spill first
    for case in chosen:
        tensors = make(case)
        kernels.kd_kl_hvp(*tensors, *hvp.direction(tensors, hvp.DIRECTIONS["all"]), *case.options, True, True)
        kernels.kd_kl_hvp(*tensors, *hvp.direction(tensors, hvp.DIRECTIONS["student"]), *case.options, False, True)
    return 2 * len(chosen)


def launch_topk(kernels):
    for case in topk.CASES:
        tensors = topk.make(case)
        grad = torch.ones(case.rows, dtype=tensors[1].dtype)
        _, stats = kernels.kd_kl_topk(*tensors, 4.0, -100, tensors[3] is not None)
        kernels.kd_kl_topk_backward(grad, *tensors, stats, 4.0, -100)
    return len(topk.CASES)  # cases of a few classes share a tile


# op -> (names of its kernels, calls of its launchers, which say how many compilations there have to be at least)
OPS = {
    "kd_kl_hvp": (("hvp_kernel",), launch_hvp),
    "kd_kl_topk": (("forward_kernel", "backward_kernel"), launch_topk),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("op", list(OPS))
def test_triton(op, architecture, tmp_path, monkeypatch):
    if not kdfast.triton.installed():
        pytest.skip("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile")
    import importlib

    from triton import knobs
    from triton.runtime import driver

    names, launch = OPS[op]
    kernels = importlib.import_module(f"kdfast.triton.{op}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", _Driver(architecture))
    compiled = {}
    for name in names:
        kernel = getattr(kernels, name)

        def compile_only(*args, grid, warmup, name=name, run=kernel.run, **kwargs):
            binary = run(*args, grid=grid, warmup=True, **kwargs)
            compiled.setdefault(binary.hash, (name, binary.asm["cubin"], binary.metadata))

        monkeypatch.setattr(kernel, "run", compile_only)
    least = launch(kernels)
    assert len(compiled) >= least
    spilled = []
    for name, cubin, metadata in compiled.values():
        file = tmp_path / "kernel.cubin"
        file.write_bytes(cubin)
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        stack, local = re.search(r"STACK:(\d+) .*?LOCAL:(\d+)", usage).groups()
        if (stack, local) != ("0", "0"):
            spilled.append((name, stack, local, metadata))
    assert spilled == []

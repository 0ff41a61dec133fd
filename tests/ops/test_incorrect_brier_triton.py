"""Triton's incorrect_brier: the law suite on a CPU under its interpreter, and what is compiled for a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdfast.triton
from tests.test_compile_only import ARCHITECTURES, _Driver

HERE = Path(__file__).resolve().parent


def test_laws_under_the_interpreter(tmp_path):
    if not kdfast.triton.installed():
        pytest.skip("triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE / "incorrect_brier_triton_laws.py")],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_spilling(architecture, tmp_path, monkeypatch):
    """For every storage type, labels and probabilities, rows of one tile and of several: what the launchers choose."""
    if not kdfast.triton.installed():
        pytest.skip("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile")
    from triton import knobs
    from triton.runtime import driver

    from kdfast.triton import incorrect_brier as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", _Driver(architecture))
    compiled = {}
    for kernel in (kernels.forward_kernel, kernels.backward_kernel):

        def compile_only(*args, grid, warmup, kernel=kernel, run=kernel.run, **kwargs):
            binary = run(*args, grid=grid, warmup=True, **kwargs)
            compiled.setdefault(binary.hash, (kernel.__name__, case, binary.asm["cubin"]))

        monkeypatch.setattr(kernel, "run", compile_only)
    widths = {torch.float64: (10, 100, 9001), torch.float32: (100, 9001), torch.bfloat16: (10, 1000)}
    for dtype, classes, soft in [(d, n, soft) for d in widths for n in widths[d] for soft in (False, True)]:
        case = (dtype, classes, "probabilities" if soft else "labels")
        real = torch.float64 if dtype == torch.float64 else torch.float32
        logits = torch.zeros(3, classes, dtype=dtype)
        given = (None, logits.to(real)) if soft else (torch.zeros(3, dtype=torch.int64), None)
        _, stats = kernels.incorrect_brier(logits, *given, -100)
        kernels.incorrect_brier_backward(torch.ones(3, dtype=real), logits, *given, stats, -100)

    assert len(compiled) == 2 * 2 * sum(map(len, widths.values()))
    spilled = []
    for name, case, cubin in compiled.values():
        file = tmp_path / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        stack, local = re.search(r"STACK:(\d+) .*?LOCAL:(\d+)", usage).groups()
        if (stack, local) != ("0", "0"):
            spilled.append((name, case, stack, local))
    assert spilled == []

"""GPU kernels where there is no GPU: every variant compiles for every architecture, and keeps its registers.

A kernel that spills registers to memory is right and slow, and nothing else in this suite would see it.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import kdfast.triton
from kdfast.reference.kd_kl import accumulate_dtype
from tests.ops.kd_kl_cases import CASES, make

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = [80, 90, 100]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def _nvcc(architecture: int) -> str:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    if f"compute_{architecture}" not in known:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    return nvcc


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_cuda(source, architecture, tmp_path):
    command = [
        _nvcc(architecture), "-c", str(source), "-o", str(tmp_path / "kernel.o"),
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        "-O3", "-std=c++20", "-Xptxas=-v", "-Xcompiler=-fPIC",
        "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-isystem", str(Path(torch.__file__).parent / "include"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = re.findall(
        r"Compiling entry function '(\S+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        done.stderr,
        re.DOTALL,
    )
    assert kernels, "ptxas reported no kernel"
    assert [k for k in kernels if k[1:] != ("0", "0", "0")] == []


class _Driver:
    """What Triton's launcher asks of a GPU before it compiles."""

    def __init__(self, architecture: int):
        from triton.backends.compiler import GPUTarget

        self.architecture, self.target = architecture, GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # no real device has this number, so its cache of kernels is its own

    def get_current_stream(self, device) -> int:
        return 0

    def get_current_target(self):
        return self.target


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_triton(architecture, tmp_path, monkeypatch):
    """The launchers themselves choose what is compiled, for every case the kernels are tested on."""
    if not kdfast.triton.installed():
        pytest.skip("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile")
    from triton import knobs
    from triton.runtime import driver

    from kdfast.triton import kd_kl as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", _Driver(architecture))
    compiled = {}
    for kernel in (kernels.forward_kernel, kernels.backward_kernel):

        def compile_only(*args, grid, warmup, kernel=kernel, run=kernel.run, **kwargs):
            binary = run(*args, grid=grid, warmup=True, **kwargs)
            compiled.setdefault(binary.hash, (kernel.__name__, case, binary.asm["cubin"]))

        monkeypatch.setattr(kernel, "run", compile_only)
    for case in CASES:
        tensors = make(case)
        grad = torch.ones(case.rows, dtype=accumulate_dtype(case.dtype))
        _, stats = kernels.kd_kl(*tensors, *case.options, tensors[2] is not None)
        kernels.kd_kl_backward(grad, *tensors, stats, *case.options, True, True)
        kernels.kd_kl_backward(grad, *tensors, stats, *case.options, True, False)

    assert len(compiled) > 2 * len(CASES)
    assert knobs.nvidia.cuobjdump.path is not None
    spilled = []
    for name, case, cubin in compiled.values():
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
            spilled.append((name, str(case), stack, local))
    assert spilled == []

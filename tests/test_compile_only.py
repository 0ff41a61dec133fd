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
from tests.ops import pathways_cases
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


@pytest.fixture
def compiled(architecture, tmp_path, monkeypatch):
    """compiled(module, *names): from now on these kernels of the module are compiled when launched, and not run.
    Returns what has been, (kernel, cubin) by hash."""
    if not kdfast.triton.installed():
        pytest.skip("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile")
    from triton.runtime import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", _Driver(architecture))
    binaries = {}

    def start(module, *names):
        for name in names:
            kernel = getattr(module, name)

            def compile_only(*args, grid, warmup, name=name, run=kernel.run, **kwargs):
                binary = run(*args, grid=grid, warmup=True, **kwargs)
                binaries.setdefault(binary.hash, (name, binary.asm["cubin"]))

            monkeypatch.setattr(kernel, "run", compile_only)
        return binaries

    return start


def _spilled(binaries: dict, directory: Path) -> list:
    from triton import knobs

    assert knobs.nvidia.cuobjdump.path is not None
    spilled = []
    for name, cubin in binaries.values():
        file = directory / "kernel.cubin"
        file.write_bytes(cubin)
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        stack, local = re.search(r"STACK:(\d+) .*?LOCAL:(\d+)", usage).groups()
        if (stack, local) != ("0", "0"):
            spilled.append((name, stack, local))
    return spilled


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_triton(compiled, tmp_path):
    """The launchers themselves choose what is compiled, for every case the kernels are tested on."""
    kernels = pytest.importorskip("kdfast.triton.kd_kl")
    binaries = compiled(kernels, "forward_kernel", "backward_kernel")
    for case in CASES:
        tensors = make(case)
        grad = torch.ones(case.rows, dtype=accumulate_dtype(case.dtype))
        _, stats = kernels.kd_kl(*tensors, *case.options, tensors[2] is not None)
        kernels.kd_kl_backward(grad, *tensors, stats, *case.options, True, True)
        kernels.kd_kl_backward(grad, *tensors, stats, *case.options, True, False)
    assert len(binaries) > 2 * len(CASES)
    assert _spilled(binaries, tmp_path) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_triton_pathways(compiled, tmp_path):
    """One map of each stage of a residual network: a program compiles for a second and more."""
    kernels = pytest.importorskip("kdfast.triton.pathways")
    from kdfast.triton import _resize, pathways_attention

    names = ("pixels_kernel", "gather_kernel", "squares_kernel", "scale_kernel")
    compiled(kernels, names[0])
    compiled(_resize, names[1])
    binaries = compiled(pathways_attention, *names[2:])
    for case in pathways_cases.TO_COMPILE:
        students, teachers, keep, grad = pathways_cases.make(case)
        options = keep, case.distance, case.resize
        kernels.pathways(students, teachers, *options)
        kernels.pathways_backward(grad, students, teachers, *options, True, False)
    assert {name for name, _ in binaries.values()} == set(names)
    assert _spilled(binaries, tmp_path) == []

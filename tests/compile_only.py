"""Compiles GPU kernels where there is no GPU, and reads what they take: registers, shared memory, spills.

Used by test_compile_only.py, which asserts, and by benchmarks/ptxas.py, which records.
"""

import contextlib
import importlib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import kdfast.triton
from kdfast.reference.kd_kl import accumulate_dtype
from tests.ops import kd_kl_cases, kd_kl_hvp_cases, kd_kl_topk_cases, pathways_cases

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = [80, 90, 100]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


class UnavailableError(Exception):
    """A compiler that is not here, or does not know the architecture."""


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    shared: int  # bytes a block, what a launch adds not counted
    stack: int  # bytes a thread
    spills: int  # bytes stored and loaded again; for Triton, bytes of local memory


# ---------------------------------------------------------------- CUDA
def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
    if found is None:
        raise UnavailableError("nvcc is not on PATH")
    return found


def cuda(source: Path, architecture: int, folder: Path) -> list[Kernel]:
    """Every kernel of a file, as ptxas reports it."""
    compiler = nvcc()
    known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    if f"compute_{architecture}" not in known:
        raise UnavailableError(f"this nvcc does not know sm_{architecture}")
    command = [
        compiler, "-c", str(source), "-o", str(folder / "kernel.o"),
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        "-O3", "-std=c++20", "-Xptxas=-v", "-Xcompiler=-fPIC",
        "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-isystem", str(Path(torch.__file__).parent / "include"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    found = re.findall(
        r"Compiling entry function '(\S+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers(?:, used \d+ barriers)?(?:, \d+ bytes cumulative stack size)?(?:, (\d+) bytes smem)?",
        done.stderr,
        re.DOTALL,
    )
    names = _short_names([name for name, *_ in found])
    return [
        Kernel(name, int(registers), int(shared or 0), int(stack), int(stores) + int(loads))
        for name, (_, stack, stores, loads, registers, shared) in zip(names, found, strict=True)
    ]


def _short_names(mangled: list[str]) -> list[str]:
    """Without namespaces, result and arguments: forward<Form<float, float, 0, false>, BlockGroup>."""
    demangler = shutil.which("c++filt")
    if demangler is None:
        return mangled
    done = subprocess.run([demangler], input="\n".join(mangled), capture_output=True, text=True, check=True)
    names = []
    for full in done.stdout.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|\(kdfast::[\w:]+\)|\bkdfast::(?:\w+::)*|^void ", "", full)
        names.append(re.sub(r"\(.*", "", name))
    return names


# ---------------------------------------------------------------- Triton
def _launch_kd_kl(kernels, at) -> int:
    for case in kd_kl_cases.CASES:
        at(case)
        tensors = kd_kl_cases.make(case)
        grad = torch.ones(case.rows, dtype=accumulate_dtype(case.dtype))
        _, stats = kernels.kd_kl(*tensors, *case.options, tensors[2] is not None)
        kernels.kd_kl_backward(grad, *tensors, stats, *case.options, True, True)
        kernels.kd_kl_backward(grad, *tensors, stats, *case.options, True, False)
    return 2 * len(kd_kl_cases.CASES)


def _launch_kd_kl_hvp(kernels, at) -> int:
    cases = kd_kl_hvp_cases.CASES
    chosen = [case for case in cases if case.classes >= 1000] + cases[1:20:4]  # the widest tiles spill first
    for case in chosen:
        at(case)
        tensors = kd_kl_cases.make(case)
        for given, both in (("all", True), ("student", False)):
            directions = kd_kl_hvp_cases.direction(tensors, kd_kl_hvp_cases.DIRECTIONS[given])
            kernels.kd_kl_hvp(*tensors, *directions, *case.options, both, True)
    return 2 * len(chosen) - 1


def _launch_kd_kl_topk(kernels, at) -> int:
    for case in kd_kl_topk_cases.CASES:
        at(case)
        tensors = kd_kl_topk_cases.make(case)
        grad = torch.ones(case.rows, dtype=tensors[1].dtype)
        _, stats = kernels.kd_kl_topk(*tensors, 4.0, -100, tensors[3] is not None)
        kernels.kd_kl_topk_backward(grad, *tensors, stats, 4.0, -100)
    return len(kd_kl_topk_cases.CASES) - 1  # cases of a few classes share a tile


def _launch_incorrect_brier(kernels, at) -> int:
    """Every storage type, labels and probabilities, rows of one tile and of several."""
    widths = {torch.float64: (10, 100, 9001), torch.float32: (100, 9001), torch.bfloat16: (10, 1000)}
    for dtype, classes, soft in [(d, n, soft) for d in widths for n in widths[d] for soft in (False, True)]:
        at((dtype, classes, "probabilities" if soft else "labels"))
        real = accumulate_dtype(dtype)
        logits = torch.zeros(3, classes, dtype=dtype)
        given = (None, logits.to(real)) if soft else (torch.zeros(3, dtype=torch.int64), None)
        _, stats = kernels.incorrect_brier(logits, *given, -100)
        kernels.incorrect_brier_backward(torch.ones(3, dtype=real), logits, *given, stats, -100)
    return 2 * 2 * sum(map(len, widths.values())) - 1


def _launch_pathways(kernels, at) -> int:
    """One map of each stage of a residual network: a program compiles for a second and more."""
    for case in pathways_cases.TO_COMPILE:
        at(case)
        students, teachers, keep, grad = pathways_cases.make(case)
        kernels.pathways(students, teachers, keep, case.distance, case.resize)
        kernels.pathways_backward(grad, students, teachers, keep, case.distance, case.resize, True, False)
    return len(pathways_cases.TO_COMPILE)


# op: ({a module below kdfast.triton: its kernels}, and what calls the launchers of the first module for every case,
# saying which by at(case); it returns what the number of kernels has to exceed).
TRITON = {
    "kd_kl": ({"kd_kl": ("forward_kernel", "backward_kernel")}, _launch_kd_kl),
    "kd_kl_hvp": ({"kd_kl_hvp": ("hvp_kernel",)}, _launch_kd_kl_hvp),
    "kd_kl_topk": ({"kd_kl_topk": ("forward_kernel", "backward_kernel")}, _launch_kd_kl_topk),
    "incorrect_brier": ({"incorrect_brier": ("forward_kernel", "backward_kernel")}, _launch_incorrect_brier),
    "pathways": (
        {
            "pathways": ("pixels_kernel",),
            "_resize": ("gather_kernel",),
            "pathways_attention": ("squares_kernel", "scale_kernel"),
        },
        _launch_pathways,
    ),
}


class Driver:
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


def triton(op: str, architecture: int, folder: Path) -> list[Kernel]:
    """What the op's launchers themselves choose to compile, each kernel named with the first case that wanted it."""
    if not kdfast.triton.installed():
        raise UnavailableError("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UnavailableError("TRITON_INTERPRET=1 leaves nothing to compile")
    modules, launch = TRITON[op]
    kernels = importlib.import_module(f"kdfast.triton.{op}")
    compiled, case = {}, []

    def catching(kernel, run):
        def compile_only(*args, grid, warmup, **kwargs):
            binary = run(*args, grid=grid, warmup=True, **kwargs)
            compiled.setdefault(binary.hash, (f"{kernel.__name__} {case[-1]}", binary.asm["cubin"]))

        return compile_only

    with _no_gpu(architecture, folder), contextlib.ExitStack() as undo:
        for module, names in modules.items():
            for name in names:
                kernel = getattr(importlib.import_module(f"kdfast.triton.{module}"), name)
                undo.callback(setattr, kernel, "run", kernel.run)
                kernel.run = catching(kernel, kernel.run)
        least = launch(kernels, case.append)
    assert len(compiled) > least, f"{len(compiled)} kernels, expected more than {least}"
    return [_usage(name, cubin, folder) for name, cubin in compiled.values()]


@contextlib.contextmanager
def _no_gpu(architecture: int, folder: Path):
    from triton.runtime import driver

    before, cache = driver._active, os.environ.get("TRITON_CACHE_DIR")
    driver._active, os.environ["TRITON_CACHE_DIR"] = Driver(architecture), str(folder)
    try:
        yield
    finally:
        driver._active = before
        os.environ.pop("TRITON_CACHE_DIR")
        if cache is not None:
            os.environ["TRITON_CACHE_DIR"] = cache


def _usage(name: str, cubin: bytes, folder: Path) -> Kernel:
    from triton import knobs

    assert knobs.nvidia.cuobjdump.path is not None
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    registers, stack, shared, local = map(int, usage.groups())
    return Kernel(name, registers, shared, stack, local)

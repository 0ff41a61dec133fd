"""Builds the CUDA sources of an op for a CPU (cuda_on_cpu.h): kernels, launchers and registration as they are, under
another library name, so that the compiled CPU kernels stay beside them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "kdfast_on_cpu"


def build(op: str, schemas: list[str], directory: Path) -> torch.library.Library:
    """Defines `schemas` in LIBRARY, compiles csrc/cuda/<op>.cu and loads it as their CPU kernels."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    shutil.copytree(ROOT / "csrc", directory / "csrc")
    for name in ("cuda_runtime", "cuda_bf16", "cuda_fp16"):
        (directory / f"{name}.h").write_text('#pragma once\n#include "cuda_on_cpu.h"\n')
    for file in (directory / "csrc" / "cuda").iterdir():
        file.write_text(_as_cpp(file.read_text()))
    binary = directory / f"{op}.so"
    torch_files = Path(torch.__file__).parent
    command = [
        compiler, "-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-I", str(directory), "-I", str(ROOT / "tests" / "ops"), "-isystem", str(torch_files / "include"),
        "-x", "c++", str(directory / "csrc" / "cuda" / f"{op}.cu"), "-x", "none", "-o", str(binary),
        "-L", str(torch_files / "lib"), "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    library = torch.library.Library(LIBRARY, "FRAGMENT")
    for schema in schemas:
        library.define(schema)
    torch.ops.load_library(binary)
    return library


def _as_cpp(source: str) -> str:
    """CUDA's two pieces of syntax, and the names of places: library, device, dynamic shared memory."""
    source = re.sub(r"extern __shared__ [^;]*\bmemory\[\];", "unsigned char* memory = on_cpu::dynamic;", source)
    source = re.sub(r"^( *)(\S.*?)<<<(.*?)>>>\((.*?)\);", r"\1on_cpu::launch(\2, \3, \4);", source, flags=re.M)
    source = re.sub(r"const torch::stable::accelerator::DeviceGuard guard\(.*?\)+;", "", source)
    return source.replace("STABLE_TORCH_LIBRARY_IMPL(kdfast, CUDA,", f"STABLE_TORCH_LIBRARY_IMPL({LIBRARY}, CPU,")

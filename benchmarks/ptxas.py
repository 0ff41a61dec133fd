"""What the GPU kernels take on each architecture: registers, shared memory, spills. Needs nvcc and triton, no GPU.

    python -m benchmarks.ptxas --out benchmarks/results/ptxas.json

Compiles every csrc/cuda/*.cu, and the Triton kernels of every case that tests/test_compile_only.py compiles.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.conftest import commit
from tests import compile_only
from tests.compile_only import ARCHITECTURES, SOURCES, TRITON


def versions() -> dict[str, str]:
    text = subprocess.run([compile_only.nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    found = {"nvcc": re.search(r"release .*?, V(\S+)", text).group(1)}
    for package in ("torch", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def kernels(architectures: list[int]) -> list[dict]:
    rows = []
    jobs = [(compile_only.cuda, source, source.name) for source in SOURCES]
    jobs += [(compile_only.triton, op, f"triton {op}") for op in TRITON]
    for compiler, what, title in jobs:
        for architecture in architectures:
            with tempfile.TemporaryDirectory() as folder:
                found = compiler(what, architecture, Path(folder))
            rows += [{"source": title, "architecture": f"sm_{architecture}", **asdict(kernel)} for kernel in found]
            most = max(kernel.registers for kernel in found)
            spilling = sum(kernel.spills > 0 or kernel.stack > 0 for kernel in found)
            print(f"{title:>24} sm_{architecture}: {len(found)} kernels, {most} registers at most, {spilling} spill")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.ptxas", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--architecture", type=int, action="append", choices=ARCHITECTURES, help="all by default")
    arguments = parser.parse_args()
    try:
        record = {
            "commit": commit(),
            "versions": versions(),
            "kernels": kernels(arguments.architecture or ARCHITECTURES),
        }
    except compile_only.UnavailableError as reason:
        sys.exit(f"{reason}; it is needed to compile the kernels.")
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    if spilling := [k for k in record["kernels"] if k["spills"] or k["stack"]]:
        sys.exit(f"{len(spilling)} kernels spill registers, such as {spilling[0]['name']}.")


if __name__ == "__main__":
    main()

"""Runs a file of Triton tests under Triton's interpreter, in a process of its own.

The interpreter is chosen by TRITON_INTERPRET when the kernels are imported, and other tests may have imported them
compiled by then.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

import kdfast.triton

HERE = Path(__file__).resolve().parent


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(".")[:2])


def run_interpreted(file: str, cache: Path) -> None:
    if not kdfast.triton.installed():
        pytest.skip("triton is not installed")
    if _version(importlib.metadata.version("triton")) < (3, 7) and _version(numpy.__version__) >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 does not run under numpy 2.4 and later")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

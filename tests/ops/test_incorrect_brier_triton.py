"""Triton's incorrect_brier: the law suite on a CPU under its interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kdfast.triton

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

"""Triton's pathways against the definition, on a CPU under Triton's interpreter.

The interpreter is chosen by TRITON_INTERPRET when the kernels are imported, and other tests may have imported them
compiled by then: so pathways_triton_interpreted.py has a process of its own, in two parts for two workers.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kdfast.triton

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("part", ["test_case", "test_edge"])
def test_interpreted(part, tmp_path):
    if not kdfast.triton.installed():
        pytest.skip("triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", part]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    file = HERE / "pathways_triton_interpreted.py"
    done = subprocess.run(
        [*command, str(file)],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

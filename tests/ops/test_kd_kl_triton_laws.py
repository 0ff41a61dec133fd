"""The law suite on Triton's kernels, on a CPU under its interpreter, in two parts for two workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kdfast.triton

HERE = Path(__file__).resolve().parent


@pytest.mark.timeout(600)  # a slow machine without AVX-512 took more than 280 s
@pytest.mark.parametrize("part", ["jsd or dkd", "not jsd and not dkd"])
def test_laws_under_the_interpreter(part, tmp_path):
    if not kdfast.triton.installed():
        pytest.skip("triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", part]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(HERE / "kd_kl_triton_laws.py")],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout

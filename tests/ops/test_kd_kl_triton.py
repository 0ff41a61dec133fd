"""Triton's kd_kl against the definition, on a CPU under Triton's interpreter.

The interpreter is chosen by TRITON_INTERPRET when the kernels are imported, and other tests may have imported
them compiled by then: so kd_kl_triton_interpreted.py has a process of its own, in two parts for two workers.
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


@pytest.mark.parametrize("part", ["test_case", "test_edge"])
def test_interpreted(part, tmp_path):
    if not kdfast.triton.installed():
        pytest.skip("triton is not installed")
    if _version(importlib.metadata.version("triton")) < (3, 7) and _version(numpy.__version__) >= (2, 4):
        pytest.skip("the interpreter of triton 3.6 does not run under numpy 2.4 and later")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", part]
    environment = os.environ | {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    file = HERE / "kd_kl_triton_interpreted.py"
    done = subprocess.run(
        [*command, str(file)],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_importing_the_package_imports_no_triton():
    """A CPU user pays nothing for the kernels that a GPU may want, and registering them is idempotent."""
    code = (
        "import sys, kdfast, kdfast.triton as t; t.register(); t.register();"
        "print(sorted(t.registered), t.status()); assert 'triton' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if kdfast.triton.installed():
        assert "kd_kl" in done.stdout or "come first" in done.stdout
    else:
        assert "pip install triton" in done.stdout

"""csrc/math/pathways.h on a CPU: windows, cells and resizing of every small size, against their definitions."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_small_size(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, binary = ROOT / "tests" / "ops" / "pathways_windows.cpp", tmp_path / "windows"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-I", str(ROOT), str(source)]
    done = subprocess.run([*command, "-o", str(binary)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *wrong, summary = subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert wrong == []
    assert int(summary.removeprefix("compared ")) > 1e6

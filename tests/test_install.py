"""The source distribution, and its install with and without a compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source distribution, unpacked."""
    place = tmp_path_factory.mktemp("source")
    made = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "-e", place, "sdist", "-d", place],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    (archive,) = place.glob("kdfast-*.tar.gz")
    shutil.unpack_archive(archive, place)
    return place / archive.name.removesuffix(".tar.gz")


def test_the_source_distribution_is_whole(source):
    there = {str(p.relative_to(source)) for p in source.rglob("*")}
    needed = [*ROOT.glob("csrc/**/*"), *ROOT.glob("kdfast/**/*.py"), *(ROOT / f for f in ("CMakeLists.txt", "LICENSE"))]
    assert {str(p.relative_to(ROOT)) for p in needed} <= there
    assert not [p for p in there if p.endswith(".so")]


def install(source, target, **environment):
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", target, source]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


def run(target, code):
    # Without the finder of this repository's own editable install, which would answer for kdfast._C.
    strip = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]; "
    environment = {**os.environ, "PYTHONPATH": str(target)}
    return subprocess.run(
        [sys.executable, "-c", strip + code], capture_output=True, text=True, env=environment, cwd=target, check=False
    )


def test_without_a_compiler_it_is_pure_python_and_says_so(source, tmp_path):
    built = install(source, tmp_path / "site", CXX="/bin/false", KDFAST_REQUIRE_NATIVE="0")
    assert built.returncode == 0, built.stderr
    code = (
        "import torch, kdfast; z = torch.randn(3, 4, requires_grad=True); kdfast.kd_loss(z, z.detach() + 1).backward();"
        "print(kdfast.__file__); print(kdfast.show_backends())"
    )
    ran = run(tmp_path / "site", code)
    assert ran.returncode == 0, ran.stderr
    assert str(tmp_path) in ran.stdout
    assert "kdfast runs in plain PyTorch, without compiled kernels: CMake could not configure" in ran.stderr
    assert "Reinstall with a C++ compiler" in ran.stderr
    assert "reference (PyTorch)" in ran.stdout
    assert "C++ (" not in ran.stdout
    assert "not built: CMake could not configure" in ran.stdout


def test_a_broken_compiler_stops_where_native_is_required(source, tmp_path):
    built = install(source, tmp_path / "site", CXX="/bin/false", KDFAST_REQUIRE_NATIVE="1")
    assert built.returncode != 0
    said = " ".join((built.stdout + built.stderr).split())
    assert "kdfast: the native build failed (CMake could not configure" in said
    assert "Install a working C++20 compiler" in said
    assert "or unset KDFAST_REQUIRE_NATIVE to install the pure-Python package." in said


def test_the_build_here_is_native():
    if os.environ.get("KDFAST_REQUIRE_NATIVE", "0") in ("", "0"):
        pytest.skip("KDFAST_REQUIRE_NATIVE is not set: a pure-Python install is allowed")
    from kdfast import _native

    assert _native.failure is None
    assert all(_native.has_kernel(op, "CPU") for op in ("kd_kl", "kd_kl_backward", "kd_kl_value_and_grad"))

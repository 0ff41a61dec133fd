"""Builds the native parts with CMake and Ninja; without a compiler installs pure Python and says so.

KDFAST_REQUIRE_NATIVE=1     a native build that fails stops the install (CI, wheels)
KDFAST_CUDA=AUTO|ON|OFF     CUDA kernels: where nvcc is and torch is a CUDA build (AUTO)
KDFAST_CUDA_ARCHITECTURES   e.g. "90": fewer architectures build faster
KDFAST_SANITIZE             e.g. "address,undefined" (`make sanitize`; built beside the normal build, not over it)
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SWITCHES = ("KDFAST_CUDA", "KDFAST_CUDA_ARCHITECTURES", "KDFAST_SANITIZE")


class CMakeBuild(build_ext):
    def run(self) -> None:
        for extension in self.extensions:
            self.build_extension(extension)

    def build_extension(self, extension: Extension) -> None:
        target = ROOT / "kdfast" if self.inplace else Path(self.build_lib).resolve() / "kdfast"
        target.mkdir(parents=True, exist_ok=True)
        for stale in (*target.glob("_C*.so"), target / "_build_failure.txt"):
            stale.unlink(missing_ok=True)
        failure = self.cmake(target)
        if failure is None:
            return
        if os.environ.get("KDFAST_REQUIRE_NATIVE", "0") not in ("", "0"):
            sys.exit(
                f"kdfast: the native build failed ({failure}). Install a working C++20 compiler (for example "
                "`apt-get install g++`, or point CXX at one), or unset KDFAST_REQUIRE_NATIVE to install the "
                "pure-Python package."
            )
        (target / "_build_failure.txt").write_text(failure + "\n")
        print(f"kdfast: installing WITHOUT compiled kernels: {failure}", file=sys.stderr)

    def cmake(self, target: Path) -> str | None:
        """Builds into `target`; returns what failed, in one line, or None."""
        cmake = shutil.which("cmake", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
        ninja = shutil.which("ninja", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
        if cmake is None or ninja is None:
            return f"{'cmake' if cmake is None else 'ninja'} was not found; `pip install cmake ninja`"
        sanitized = "-sanitize" if os.environ.get("KDFAST_SANITIZE") else ""
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}{sanitized}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-DKDFAST_OUTPUT_DIR={target}", *pybind11_dir(),
            *(f"-D{name}={os.environ.get(name, 'AUTO' if name == 'KDFAST_CUDA' else '')}"
              for name in SWITCHES if name in os.environ or name != "KDFAST_CUDA_ARCHITECTURES"),
        ]  # fmt: skip
        log = build / "kdfast-build.log"
        with log.open("w") as out:
            for step, command in (("configure", [*configure, "--fresh"]), ("build", [cmake, "--build", str(build)])):
                if subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode != 0:
                    return f"CMake could not {step}; the log is {log}: {first_error(log)}"
        return None


def pybind11_dir() -> list[str]:
    try:
        import pybind11
    except ImportError:
        return []
    return [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]


def first_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    told = [
        f"{line} {following}".strip()
        for line, following in zip(lines, (*lines[1:], ""), strict=True)
        if "error" in line.lower()
    ]
    return told[0][:300] if told else "no error line in it"


# What a source distribution has to carry: paths relative to this file, as setuptools wants them.
SOURCES = ["CMakeLists.txt", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file())]
setup(ext_modules=[Extension("kdfast._C", sources=[], depends=SOURCES)], cmdclass={"build_ext": CMakeBuild})

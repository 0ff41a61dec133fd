"""Peak memory of a step on the CPU, as the operating system sees it."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def peak_extra_bytes(run: Callable[[], None]) -> int | None:
    """How far the resident memory rises at most while `run` runs; None where the system does not tell (not Linux)."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is given back, so that using it again counts
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return None
    before = _kilobytes("VmRSS")
    run()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

"""Shared by every test: the machine is shared too, so one thread a process; CUDA tests skip where there is no GPU."""

import os

import pytest
import torch

from tests import fuzz

torch.set_num_threads(1)
# Minutes each: begun first, so that no process waits for another at the end (with --no-loadscope-reorder).
LONGEST = ("test_compile_only.py", "test_kd_kl_triton_laws.py", "test_incorrect_brier_triton.py", "test_run.py")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def pytest_generate_tests(metafunc):
    """The law suite's parameters come from the op a class describes."""
    op = getattr(metafunc.cls, "op", None)
    for name, table in (("variant", "variants"), ("shape", "shapes"), ("extreme", "extremes")):
        if op is not None and name in metafunc.fixturenames:
            values = getattr(op, table)
            keys = list(values)
            metafunc.parametrize(name, keys if name == "extreme" else [values[k] for k in keys], ids=keys)
    # Triton's interpreter plays a GPU on the CPU: a GPU has no part in it.
    if op is not None and "device" in metafunc.fixturenames and torch.cuda.is_available() and not INTERPRETED:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True)


def pytest_report_header():
    if fuzz.FUZZ_CASES:
        return f"fuzzing: KDFAST_FUZZ_CASES={fuzz.FUZZ_CASES} an op, KDFAST_FUZZ_SEED={fuzz.FUZZ_SEED}"
    return None


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if "slow" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="opt-in: -m slow"))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no NVIDIA GPU here")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)

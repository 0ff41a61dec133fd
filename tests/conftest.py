"""Shared by every test: the machine is shared too, so one thread a process; CUDA tests skip where there is no GPU."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    """The law suite's parameters come from the op a class describes."""
    op = getattr(metafunc.cls, "op", None)
    for name, table in (("variant", "variants"), ("shape", "shapes"), ("extreme", "extremes")):
        if op is not None and name in metafunc.fixturenames:
            values = getattr(op, table)
            keys = list(values)
            metafunc.parametrize(name, keys if name == "extreme" else [values[k] for k in keys], ids=keys)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no NVIDIA GPU here")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)

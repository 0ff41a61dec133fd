"""Fair timing: every implementation of a case is run in turn, round after round, so that what the machine does
meanwhile (clock, neighbours, page cache) falls on all alike; medians are compared.

pytest-benchmark times one test after another. Here the first test of a case times all its implementations
interleaved, and each test then enters its own rounds into pytest-benchmark's statistics.
"""

import gc
import time
from collections.abc import Callable

import pytest
import torch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
_measured: dict[tuple, dict[str, list[float]]] = {}


def measure(
    key: tuple, implementations: dict[str, Callable[[], None]], seconds: float, sync: bool, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of every round by implementation: 7 rounds at least, as many as fit into `seconds` otherwise; on a GPU,
    whose rounds are short, into a quarter of it."""
    if key in _measured:
        return _measured[key]
    for run in implementations.values():
        for _ in range(warmup):
            run()
    rounds = {name: [] for name in implementations}
    gc.collect()
    gc.disable()
    try:
        stop = time.perf_counter() + (seconds / 4 if sync else seconds)
        while len(rounds[name := next(iter(rounds))]) < 7 or (time.perf_counter() < stop and len(rounds[name]) < 500):
            for name, run in implementations.items():
                if sync:
                    torch.cuda.synchronize()
                begin = time.perf_counter()
                run()
                if sync:
                    torch.cuda.synchronize()
                rounds[name].append(time.perf_counter() - begin)
    finally:
        gc.enable()
    _measured[key] = rounds
    return rounds


def enter(benchmark, seconds: list[float], **extra_info) -> None:
    """Gives rounds timed elsewhere to pytest-benchmark."""
    benchmark.extra_info.update(extra_info)
    benchmark._mode = "interleaved"
    stats = benchmark._make_stats(1)
    for duration in seconds:
        stats.update(duration)

"""What the machine can do at most: the floors that kernel times are held against."""

import functools
import statistics
import time

import torch


def _median_seconds(run, rounds: int = 9) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes per second of a plain copy, counting bytes read and written, far outside the caches."""
    size = (1 << 28) if device == "cpu" else (1 << 32)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / _median_seconds(lambda: target.copy_(source))


def exponential_seconds(*tensors: torch.Tensor) -> float:
    """One bare vectorised exponential of each element, into memory that is already there."""
    outputs = [torch.empty_like(t) for t in tensors]

    def run():
        for t, out in zip(tensors, outputs, strict=True):
            torch.exp(t, out=out)

    with torch.no_grad():
        run()
        return _median_seconds(run)

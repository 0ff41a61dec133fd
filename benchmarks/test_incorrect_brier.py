"""incorrect_brier forward + backward against PyTorch eager and torch.compile.

    pytest benchmarks --benchmark-only -k incorrect_brier

Half of the rows are right, as on a validation batch in the middle of a training. A case's bytes are those of the fewest
passes that can be: read the logits, write their gradient.
"""

import statistics

import pytest
import torch
import torch.nn.functional as F

from benchmarks.interleave import DEVICES, enter, measure
from benchmarks.roofline import copy_bandwidth, exponential_seconds
from kdfast import incorrect_brier

SHAPES = [
    (128, 10, torch.float32),
    (128, 100, torch.float32),
    (256, 1000, torch.float32),
    (4096, 1000, torch.float32),
    (512, 32000, torch.float32),
    (512, 32000, torch.bfloat16),
]
IMPLEMENTATIONS = ["kdfast", "eager", "compile"]


def eager(logits, labels):
    wrong = logits.argmax(-1) != labels
    return ((logits.softmax(-1) - F.one_hot(labels, logits.shape[-1])).square().sum(-1) * wrong).mean()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}-{str(s[2])[6:]}")
@pytest.mark.parametrize("device", DEVICES)
def test_incorrect_brier(benchmark, device, shape, implementation):
    rows, classes, dtype = shape
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, classes, generator=generator)).to(device, dtype)
    labels = torch.randint(classes, (rows,), generator=generator).to(device)
    labels[::2] = logits[::2].argmax(-1)
    logits.requires_grad_()

    def step(loss):
        def run():
            loss(logits, labels).backward()
            logits.grad = None  # freed by who made it, not by the next one

        return run

    runs = {"kdfast": step(incorrect_brier), "eager": step(eager), "compile": step(torch.compile(eager, dynamic=False))}
    torch._dynamo.reset()
    rounds = measure(("incorrect_brier", device, shape), runs, seconds=2.0, sync=device == "cuda")
    bytes_moved = 2 * logits.numel() * logits.element_size()
    median = statistics.median(rounds[implementation])
    enter(
        benchmark, rounds[implementation], op="incorrect_brier", case=f"{rows}x{classes}", impl=implementation,
        dtype=str(dtype)[6:], device=device, threads=torch.get_num_threads(), bytes=bytes_moved,
        percent_of_copy=100 * bytes_moved / copy_bandwidth(device) / median,
        times_exp_pass=median / exponential_seconds(logits.detach()),
    )  # fmt: skip

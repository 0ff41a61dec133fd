"""The second order of kd_kl, as an exact meta-gradient asks for it: d/dteacher of <d loss / d student, w>.

    pytest benchmarks --benchmark-only -k kd_kl_hvp

The first backward is made once, outside the clock; what is timed is the backward of the backward. A case's bytes are
those of the fewest passes that can be: read student, read teacher, read w, write the product.
"""

import statistics

import pytest
import torch

from benchmarks.interleave import DEVICES, enter, measure
from benchmarks.roofline import copy_bandwidth, exponential_seconds
from benchmarks.test_kd_kl import eager
from kdfast import kd_loss

SHAPES = [
    (128, 100, torch.float32),
    (256, 1000, torch.float32),
    (4096, 1000, torch.float32),
    (512, 32000, torch.float32),
    (512, 32000, torch.bfloat16),
]
IMPLEMENTATIONS = ["kdfast", "eager"]  # torch.compile has no double backward


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}-{str(s[2])[6:]}")
@pytest.mark.parametrize("device", DEVICES)
def test_kd_kl_hvp(benchmark, device, shape, implementation):
    rows, classes, dtype = shape
    generator = torch.Generator().manual_seed(0)
    student, teacher, w = (torch.randn(rows, classes, generator=generator).to(device, dtype) for _ in range(3))
    student.requires_grad_()
    teacher.requires_grad_()

    def second(loss):
        (first,) = torch.autograd.grad(loss(student, teacher), student, create_graph=True)
        return lambda: torch.autograd.grad(first, teacher, w, retain_graph=True)

    rounds = measure((device, shape, "hvp"), {"kdfast": second(kd_loss), "eager": second(eager)}, seconds=2.0,
                     sync=device == "cuda")  # fmt: skip
    bytes_moved = 4 * student.numel() * student.element_size()
    median = statistics.median(rounds[implementation])
    enter(
        benchmark, rounds[implementation], op="kd_kl_hvp", case=f"{rows}x{classes}", impl=implementation,
        dtype=str(dtype)[6:], device=device, threads=torch.get_num_threads(), bytes=bytes_moved,
        percent_of_copy=100 * bytes_moved / copy_bandwidth(device) / median,
        times_exp_pass=median / exponential_seconds(student.detach(), teacher.detach()),
    )  # fmt: skip

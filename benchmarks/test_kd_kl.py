"""kd_kl forward + backward against PyTorch eager and torch.compile.

    pytest benchmarks --benchmark-only -k kd_kl

Two uses: `KxC` the divergence alone (tau 4, batchmean), `KxC+labels` the whole Hinton loss with hard labels. A case's
bytes are those of the fewest passes that can be: read student, read teacher, write the student's gradient. A GPU has
larger cases too, whose kernels take longer than their launches, and `kdfast-fused`: kd_loss(fuse_backward=True).
"""

import functools
import itertools
import statistics

import pytest
import torch
import torch.nn.functional as F

from benchmarks.interleave import enter, measure
from benchmarks.roofline import copy_bandwidth, exponential_seconds
from kdfast import kd_loss

# (rows, classes, dtype): CIFAR and ImageNet batches, then language vocabularies
SHAPES = [
    (128, 10, torch.float32),
    (128, 100, torch.float32),
    (256, 1000, torch.float32),
    (1024, 1000, torch.float32),
    (4096, 1000, torch.float32),
    (512, 32000, torch.float32),
    (128, 128256, torch.float32),
    (512, 32000, torch.bfloat16),
]
ON_A_GPU = [(4096, 32000, torch.float32), (8192, 32000, torch.bfloat16), (4096, 128256, torch.bfloat16)]
IMPLEMENTATIONS, FUSED = ["kdfast", "eager", "compile"], "kdfast-fused"  # the latter on a GPU


def eager(student, teacher, labels=None, tau=4.0):
    soft = tau**2 * F.kl_div(F.log_softmax(student / tau, -1), F.softmax(teacher / tau, -1), reduction="batchmean")
    return soft if labels is None else 0.5 * F.cross_entropy(student, labels) + 0.5 * soft


def cases(device):
    shapes, names, marks = SHAPES, IMPLEMENTATIONS, ()
    if device == "cuda":
        shapes, names, marks = ON_A_GPU + SHAPES, [*IMPLEMENTATIONS, FUSED], pytest.mark.cuda
    for shape, with_labels, name in itertools.product(shapes, (False, True), names):
        what = f"{shape[0]}x{shape[1]}-{str(shape[2])[6:]}-{'labels' if with_labels else 'divergence'}"
        yield pytest.param(device, shape, with_labels, name, id=f"{device}-{what}-{name}", marks=marks)


@pytest.mark.parametrize(("device", "shape", "with_labels", "implementation"), [*cases("cpu"), *cases("cuda")])
def test_kd_kl(benchmark, device, shape, with_labels, implementation):
    rows, classes, dtype = shape
    key = (device, shape, with_labels)
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (torch.randn(shape[:2], generator=generator, device=device).to(dtype) for _ in range(2))
    student.requires_grad_()
    labels = torch.randint(classes, (rows,), generator=generator, device=device) if with_labels else None

    def step(loss):
        def run():
            loss(student, teacher, labels).backward()
            student.grad = None  # freed by who made it, not by the next one

        return run

    runs = {"kdfast": step(kd_loss), "eager": step(eager), "compile": step(torch.compile(eager, dynamic=False))}
    if device == "cuda":
        runs[FUSED] = step(functools.partial(kd_loss, fuse_backward=True))
    torch._dynamo.reset()
    rounds = measure(key, runs, seconds=2.0, sync=device == "cuda")
    bytes_moved = 3 * student.numel() * student.element_size()
    median = statistics.median(rounds[implementation])
    enter(
        benchmark, rounds[implementation], op="kd_kl", case=f"{rows}x{classes}" + ("+labels" if with_labels else ""),
        impl=implementation, dtype=str(dtype)[6:], device=device, threads=torch.get_num_threads(), bytes=bytes_moved,
        percent_of_copy=100 * bytes_moved / copy_bandwidth(device) / median,
        times_exp_pass=median / exponential_seconds(student.detach(), teacher),
    )  # fmt: skip

"""kd_kl_exits forward + backward against kd_loss exit by exit, PyTorch eager and torch.compile.

    pytest benchmarks --benchmark-only -k kd_kl_exits

Three exits with labels (alpha 1/2, tau 1, MetaDistiller's); only the students learn. A case's bytes are those of the
fewest passes that can be: read students, read targets, write the students' gradients.
"""

import statistics

import pytest
import torch

from benchmarks.interleave import DEVICES, enter, measure
from benchmarks.roofline import copy_bandwidth, exponential_seconds
from benchmarks.test_kd_kl import eager as eager_exit
from kdfast import exits_kd_loss, kd_loss

EXITS = 3
SHAPES = [(128, 10, torch.float32), (128, 100, torch.float32), (256, 1000, torch.float32), (256, 1000, torch.bfloat16)]
IMPLEMENTATIONS = ["kdfast", "eager", "kdfast-each", "compile"]  # ours each after one that empties the caches


def ours(students, teachers, labels):
    return exits_kd_loss(students, teachers, labels).sum()


def each(students, teachers, labels):
    return sum(kd_loss(s, t, labels, student_temperature=1.0) for s, t in zip(students, teachers, strict=True))


def eager(students, teachers, labels):
    return sum(eager_exit(s, t, labels, tau=1.0) for s, t in zip(students, teachers, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}-{str(s[2])[6:]}")
@pytest.mark.parametrize("device", DEVICES)
def test_kd_kl_exits(benchmark, device, shape, implementation):
    rows, classes, dtype = shape
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(rows, classes, generator=generator).to(device, dtype) for _ in range(2 * EXITS)]
    students, teachers = [x.requires_grad_() for x in logits[:EXITS]], logits[EXITS:]
    labels = torch.randint(classes, (rows,), generator=generator).to(device)

    def step(loss):
        def run():
            loss(students, teachers, labels).backward()
            for x in students:
                x.grad = None  # freed by who made it, not by the next one

        return run

    compiled = torch.compile(eager, dynamic=False)
    runs = {"kdfast": step(ours), "eager": step(eager), "kdfast-each": step(each), "compile": step(compiled)}
    torch._dynamo.reset()
    rounds = measure((device, shape, "exits"), runs, seconds=2.0, sync=device == "cuda")
    bytes_moved = 3 * EXITS * students[0].numel() * students[0].element_size()
    median = statistics.median(rounds[implementation])
    enter(
        benchmark, rounds[implementation], op="kd_kl_exits", case=f"{EXITS}x{rows}x{classes}", impl=implementation,
        dtype=str(dtype)[6:], device=device, threads=torch.get_num_threads(), bytes=bytes_moved,
        percent_of_copy=100 * bytes_moved / copy_bandwidth(device) / median,
        times_exp_pass=median / (EXITS * exponential_seconds(students[0].detach(), teachers[0])),
    )  # fmt: skip

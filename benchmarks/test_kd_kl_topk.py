"""kd_kl_topk forward + backward against PyTorch eager and torch.compile: vocabularies, the 64 likeliest tokens.

    pytest benchmarks --benchmark-only -k kd_kl_topk

A case's bytes are those of the fewest passes that can be: read student, write its gradient.
"""

import statistics

import pytest
import torch
import torch.nn.functional as F

from benchmarks.interleave import DEVICES, enter, measure
from benchmarks.roofline import copy_bandwidth, exponential_seconds
from kdfast import topk_kd_loss, topk_teacher

# (rows, classes, k, dtype)
SHAPES = [
    (256, 1000, 20, torch.float32),
    (512, 32000, 64, torch.float32),
    (512, 32000, 64, torch.bfloat16),
    (128, 128256, 64, torch.float32),
]
IMPLEMENTATIONS = ["kdfast", "eager", "compile"]


def eager(student, log_probs, indices, tau=4.0):
    log_q = F.log_softmax(student / tau, -1)
    p = log_probs.exp()
    p_tail = (1 - p.sum(-1)).clamp(min=1e-7)
    log_q_tail = log_q.scatter(-1, indices, -torch.inf).logsumexp(-1)
    soft = (p * (log_probs - log_q.gather(-1, indices))).sum(-1) + p_tail * (p_tail.log() - log_q_tail)
    return tau**2 * soft.mean()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}-{s[2]}-{str(s[3])[6:]}")
@pytest.mark.parametrize("device", DEVICES)
def test_kd_kl_topk(benchmark, device, shape, implementation):
    rows, classes, k, dtype = shape
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, classes, generator=generator).to(device, dtype) for _ in range(2))
    log_probs, indices = topk_teacher(teacher, k)
    student.requires_grad_()

    def step(loss):
        def run():
            loss(student, log_probs, indices).backward()
            student.grad = None  # freed by who made it, not by the next one

        return run

    runs = {"kdfast": step(topk_kd_loss), "eager": step(eager), "compile": step(torch.compile(eager, dynamic=False))}
    torch._dynamo.reset()
    rounds = measure((device, shape, "topk"), runs, seconds=2.0, sync=device == "cuda")
    bytes_moved = 2 * student.numel() * student.element_size()
    median = statistics.median(rounds[implementation])
    enter(
        benchmark, rounds[implementation], op="kd_kl_topk", case=f"{rows}x{classes}-{k}", impl=implementation,
        dtype=str(dtype)[6:], device=device, threads=torch.get_num_threads(), bytes=bytes_moved,
        percent_of_copy=100 * bytes_moved / copy_bandwidth(device) / median,
        times_exp_pass=median / exponential_seconds(student.detach(), teacher),
    )  # fmt: skip

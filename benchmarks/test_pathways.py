"""pathway_loss forward + backward against PyTorch eager and torch.compile.

    pytest benchmarks --benchmark-only -k pathways

`27 pathways`: a WRN-40-2 teacher and a WRN-16-2 student on CIFAR, three features each and three transforms, the
students' maps in the teachers' shapes, each teacher's map in nine pathways. `resnet`: the four features of an ImageNet
ResNet, one pathway each, windows overlapping at 14 and 7; under `nearest` and `bilinear` the students' maps have half
the teachers' sizes. A case's bytes are those of the fewest passes that can be: read each map once, write each student's
gradient. `times_exp_pass` is here the time over that of one bare copy of the students' maps into memory at hand.
"""

import statistics

import pytest
import torch
import torch.nn.functional as F

from benchmarks.interleave import DEVICES, enter, measure
from benchmarks.roofline import _median_seconds, copy_bandwidth
from kdfast import pathway_loss

WRN = [(32, 32, 32), (64, 16, 16), (128, 8, 8)]
RESNET = [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]
LAST = torch.channels_last
# name -> (batch, teachers' shapes, pathways a teacher, distance, students smaller by, memory format, dtype)
CASES = {
    "27 pathways": (128, WRN, 9, "hcl", 1, torch.contiguous_format, torch.float32),
    "27 pathways bf16": (128, WRN, 9, "hcl", 1, torch.contiguous_format, torch.bfloat16),
    "27 pathways NHWC": (128, WRN, 9, "hcl", 1, LAST, torch.float32),
    "resnet": (16, RESNET, 1, "hcl", 1, torch.contiguous_format, torch.float32),
    "resnet bf16 NHWC": (16, RESNET, 1, "hcl", 1, LAST, torch.bfloat16),
    "resnet mse": (16, RESNET, 1, "mse", 1, torch.contiguous_format, torch.float32),
    "resnet l1": (16, RESNET, 1, "l1", 1, torch.contiguous_format, torch.float32),
    "resnet attention": (16, RESNET, 1, "attention", 1, torch.contiguous_format, torch.float32),
    "resnet nearest": (16, RESNET[:3], 1, "hcl", 2, torch.contiguous_format, torch.float32),
    "resnet bilinear": (16, RESNET[:3], 1, "mse", 2, torch.contiguous_format, torch.float32),
}
IMPLEMENTATIONS = ["kdfast", "eager", "compile"]


def hcl(a, b):
    """As published: each map pooled on its own."""
    total, weight, loss = 1.0, 1.0, F.mse_loss(a, b)
    for level in (4, 2, 1):
        if level < a.shape[2]:
            weight /= 2
            total += weight
            loss = loss + weight * F.mse_loss(F.adaptive_avg_pool2d(a, level), F.adaptive_avg_pool2d(b, level))
    return loss / total


def attention(a, b):
    return F.mse_loss(*(F.normalize(x.pow(2).sum(1).flatten(1)) for x in (a, b)))


EAGER = {"hcl": hcl, "mse": F.mse_loss, "l1": F.l1_loss, "attention": attention}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_pathways(benchmark, device, case, implementation):
    batch, shapes, repeat, distance, smaller, order, dtype = CASES[case]
    resize = "bilinear" if "bilinear" in case else "nearest"
    generator = torch.Generator().manual_seed(0)

    def draw(channels, height, width):
        x = torch.randn(batch, channels, height, width, generator=generator)
        return x.to(device, dtype).contiguous(memory_format=order)

    distinct = [draw(*s) for s in shapes]
    teachers = [t for t in distinct for _ in range(repeat)]
    students = [draw(t.shape[1], t.shape[2] // smaller, t.shape[3] // smaller).requires_grad_() for t in teachers]
    weights = torch.rand(len(students), generator=generator).to(device)

    def eager(students, teachers, weights):
        moved = [
            a if smaller == 1 else F.interpolate(a, size=b.shape[2:], mode=resize)
            for a, b in zip(students, teachers, strict=True)
        ]
        return sum(w * EAGER[distance](a, b) for w, a, b in zip(weights, moved, teachers, strict=True))

    def ours(students, teachers, weights):
        return pathway_loss(students, teachers, weights, distance=distance, resize=resize)

    def step(loss):
        def run():
            loss(students, teachers, weights).backward()
            for s in students:
                s.grad = None  # freed by who made it, not by the next one

        return run

    runs = {"kdfast": step(ours), "eager": step(eager), "compile": step(torch.compile(eager, dynamic=False))}
    torch._dynamo.reset()
    rounds = measure((device, case), runs, seconds=4.0, sync=device == "cuda")
    gradients = sum(s.numel() * s.element_size() for s in students)
    bytes_moved = 2 * gradients + sum(t.numel() * t.element_size() for t in distinct)
    outputs = [torch.empty_like(s) for s in students]
    copy = _median_seconds(lambda: [out.copy_(s.detach()) for out, s in zip(outputs, students, strict=True)])
    median = statistics.median(rounds[implementation])
    enter(
        benchmark, rounds[implementation], op="pathways", case=case, impl=implementation, dtype=str(dtype)[6:],
        device=device, threads=torch.get_num_threads(), bytes=bytes_moved,
        percent_of_copy=100 * bytes_moved / copy_bandwidth(device) / median, times_exp_pass=median / copy,
    )  # fmt: skip

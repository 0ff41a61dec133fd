"""perturb and virtual_step over whole networks against PyTorch, tensor by tensor and torch.compiled.

    pytest benchmarks --benchmark-only -k "perturb or virtual_step"

A case's bytes are those of the fewest passes that can be: perturb reads theta, g, v for its sums, theta, v again, and
writes one point; virtual_step reads theta, g and the momentum buffer and writes theta+.
"""

import statistics

import pytest
import torch

from benchmarks.interleave import DEVICES, enter, measure
from benchmarks.roofline import copy_bandwidth, exponential_seconds
from kdfast.ops.perturb import perturb
from kdfast.ops.virtual_step import virtual_step

IMPLEMENTATIONS = ["kdfast", "eager", "compile"]
FACTOR, RADIUS = -0.05, 1e-3
RULE = (0.05, 5e-4, 0.9, 0.0, True)  # lr, weight_decay, momentum, dampening, nesterov


def convolutions(width: int, depth: int) -> list[tuple[int, ...]]:
    """Weights and two normalisation vectors of `depth` convolutions, and a classifier."""
    return [s for _ in range(depth) for s in ((width, width, 3, 3), (width,), (width,))] + [(100, width), (100,)]


NETWORKS = {"20x32": convolutions(32, 20), "50x256": convolutions(256, 50)}


def eager_perturb(theta, g, v):
    w = [FACTOR * x for x in v]
    rms = [x / t.numel() ** 0.5 for x, t in zip(torch._foreach_norm(w), theta, strict=True)]
    at = [i for i, t in enumerate(theta) if t.dim() >= 2]
    for i, size in zip(at, torch._foreach_norm([theta[i] for i in at]), strict=True):
        rms[i] = rms[i] / (size / theta[i].numel() ** 0.5).clamp(min=1e-3)
    relative = torch.linalg.vector_norm(torch.stack(rms))
    epsilon = torch.where(relative.isfinite() & (relative > 0), RADIUS / relative, 0.0)
    slope = torch.stack([(y * x).sum() for y, x in zip(g, w, strict=True)]).sum()
    return [torch.addcmul(t, x, epsilon) for t, x in zip(theta, w, strict=True)], epsilon, slope


def eager_step(theta, g, buffers):
    lr, weight_decay, momentum, dampening, _ = RULE
    out = []
    for t, y, b in zip(theta, g, buffers, strict=True):
        d = y + weight_decay * t
        d = d + momentum * (momentum * b + (1 - dampening) * d)
        out.append(t - lr * d)
    return out


OPS = {
    "perturb": (
        lambda theta, g, v: perturb(theta, g, v, [FACTOR] * len(theta), RADIUS, False),
        eager_perturb,
        6,
    ),
    "virtual_step": (lambda theta, g, buffers: virtual_step(theta, g, buffers, *RULE), eager_step, 4),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", DEVICES)
def test_lists(benchmark, device, op, network, implementation):
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(s, generator=generator).to(device) for s in NETWORKS[network]] for _ in range(3)]
    ours, eager, passes = OPS[op]
    torch._dynamo.reset()
    compiled = torch.compile(eager, dynamic=False)
    runs = {name: (lambda f=f: f(*lists)) for name, f in (("kdfast", ours), ("eager", eager), ("compile", compiled))}
    rounds = measure((op, device, network), runs, seconds=2.0, sync=device == "cuda")
    elements = sum(x.numel() for x in lists[0])
    median = statistics.median(rounds[implementation])
    enter(
        benchmark, rounds[implementation], op=op, case=f"{network} ({len(lists[0])} tensors)", impl=implementation,
        dtype="float32", device=device, threads=torch.get_num_threads(), bytes=4 * passes * elements,
        percent_of_copy=100 * 4 * passes * elements / copy_bandwidth(device) / median,
        times_exp_pass=median / exponential_seconds(*lists[0]),
    )  # fmt: skip

"""Error of the meta-gradient by displacement radius, against double backward in fp64 (docs/math/hypergradient.md).

    python tests/meta/error_curve.py        # about 3 minutes on one core

The student is trained a little on synthetic images first, so that its gradients are not those of initialisation.
`weights x10` multiplies the convolutions, whose scale the BatchNorm behind them takes out again: the function is
the same, the right displacement is not.
"""

import copy
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

from kdfast.meta import exact_hypergradient, meta_kd_step
from kdfast.methods import MKD, DistPro
from kdfast.models import CifarResNet

BATCHES, BATCH, CLASSES = 6, 64, 10
GRIDS = {  # radii around the best, by precision and scale of the weights
    ("float64", 1.0): (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3),
    ("float32", 0.1): (1e-4, 3e-4, 1e-3, 3e-3),
    ("float32", 1.0): (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    ("float32", 10.0): (1e-4, 3e-4, 1e-3, 3e-3),
    ("tf32", 1.0): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("float16", 1.0): (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    ("bfloat16", 1.0): (1e-2, 3e-2, 6e-2, 1e-1, 2e-1),
}


def data(count: int, generator: torch.Generator):
    """A prototype for each class, and noise."""
    prototypes = torch.randn(CLASSES, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(CLASSES, (count,), generator=generator)
    return prototypes[targets] + 1.5 * torch.randn(count, 3, 16, 16, generator=generator), targets


def pretrain(network, steps: int, generator: torch.Generator, batch=lambda generator: data(BATCH, generator)):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        inputs, targets = batch(generator)
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    return network


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to ten bits of mantissa, as a GPU rounds the operands of a convolution."""
    bits = (x.detach().view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)
    return x + (bits.view(torch.float32) - x).detach()


def tf32_conv(self, inputs, weight, bias, conv=nn.Conv2d._conv_forward):
    return conv(self, tf32(inputs), tf32(weight), bias)


def meta_gradient(distiller, batches, radius, tangent, precision):
    distiller = copy.deepcopy(distiller)
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.05, momentum=0.9)
    meta_optimizer = torch.optim.SGD(distiller.meta_parameters(), lr=0.0)
    conv = tf32_conv if precision == "tf32" else nn.Conv2d._conv_forward
    half = precision in ("bfloat16", "float16")
    autocast = torch.autocast("cpu", getattr(torch, precision) if half else torch.bfloat16, enabled=half)
    with autocast, mock.patch.object(nn.Conv2d, "_conv_forward", conv):
        report = meta_kd_step(distiller, *batches, optimizer, meta_optimizer, radius=radius, tangent=tangent)
    h = torch.cat([p.grad.flatten() for p in distiller.meta_parameters()])
    return h.double(), report.tangent_error.double()


def exact(distiller, batches):
    distiller = copy.deepcopy(distiller).double()
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.05, momentum=0.9)
    batches = [(inputs.double(), targets) for inputs, targets in batches]
    return torch.cat([h.flatten() for h in exact_hypergradient(distiller, *batches, optimizer)])


def median_errors(distiller, pairs, truth, radius, tangent, precision):
    """Relative errors of h, and of the training loss along w."""
    results = [meta_gradient(distiller, pair, radius, tangent, precision) for pair in pairs]
    errors = torch.stack([(h - exact).norm() / exact.norm() for (h, _), exact in zip(results, truth, strict=True)])
    return errors.quantile(0.5).item(), torch.stack([known for _, known in results]).quantile(0.5).item()


def main():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    teacher = pretrain(CifarResNet(8, (16, 16, 32)), 40, generator)
    student = pretrain(CifarResNet(8, (8, 16, 16)), 30, generator)
    methods = {"DistPro": DistPro(student, teacher, transforms=["conv1"]), "MKD": MKD(student, teacher, alpha=0.1)}
    batches = [(data(BATCH, generator), data(BATCH, generator)) for _ in range(BATCHES)]
    print(f"torch {torch.__version__}; median of {BATCHES} batches: error of h (of the training loss along w)")
    for (precision, scale), radii in GRIDS.items():
        for name, method in methods.items():
            method = copy.deepcopy(method)
            for p in method.student.parameters():
                p.data.mul_(scale if p.dim() == 4 else 1.0)
            truth = [exact(method, pair) for pair in batches]
            dtype = torch.float64 if precision == "float64" else torch.float32
            method = method.to(dtype)
            pairs = [[(inputs.to(dtype), targets) for inputs, targets in pair] for pair in batches]
            print(f"\n{precision}, weights x{scale:g}, {name}\n  radius  forward            central")
            for radius in radii:
                cells = [median_errors(method, pairs, truth, radius, t, precision) for t in ("forward", "central")]
                print(f"  {radius:.0e}   " + "  ".join(f"{h:.1e} ({known:.1e})" for h, known in cells), flush=True)


if __name__ == "__main__":
    main()

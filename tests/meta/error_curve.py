"""Error of the meta-gradient by displacement radius, against double backward in fp64 (docs/math/hypergradient.md).

    python tests/meta/error_curve.py

Two students of synthetic images, trained a little first so that the gradients are not those of initialisation;
`scale` multiplies all weights that a BatchNorm follows, which leaves the function as it is.
"""

import copy

import torch
from torch.nn import functional as F

from kdfast.meta import exact_hypergradient, meta_kd_step
from kdfast.methods import MKD, DistPro
from kdfast.models import CifarResNet

BATCHES, BATCH, CLASSES = 4, 32, 10
RADII = [10 ** (e / 2) for e in range(-16, 0)]
GRIDS = {
    "float64": [r for r in RADII if r < 1e-2],
    "float32": [r for r in RADII if 1e-5 < r < 1e-1],
    "bfloat16": [r for r in RADII if 2e-3 < r],
}


def data(count: int, generator: torch.Generator):
    """A prototype for each class, and noise."""
    prototypes = torch.randn(CLASSES, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(CLASSES, (count,), generator=generator)
    return prototypes[targets] + 1.5 * torch.randn(count, 3, 16, 16, generator=generator), targets


def pretrain(network, steps: int, generator: torch.Generator):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        inputs, targets = data(64, generator)
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    return network


def meta_gradient(distiller, batches, radius, tangent, autocast):
    distiller = copy.deepcopy(distiller)
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.05, momentum=0.9)
    meta_optimizer = torch.optim.SGD(distiller.meta_parameters(), lr=0.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        report = meta_kd_step(distiller, *batches, optimizer, meta_optimizer, radius=radius, tangent=tangent)
    return torch.cat([p.grad.flatten() for p in distiller.meta_parameters()]).double(), report.tangent_error.item()


def exact(distiller, batches):
    distiller = copy.deepcopy(distiller).double()
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.05, momentum=0.9)
    batches = [(inputs.double(), targets) for inputs, targets in batches]
    return torch.cat([h.flatten() for h in exact_hypergradient(distiller, *batches, optimizer)])


def rescale(student, scale: float):
    for name, p in student.named_parameters():
        if p.dim() == 4:
            p.data.mul_(scale)


def main():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    teacher = pretrain(CifarResNet(8, (16, 16, 32)), 60, generator)
    student = pretrain(CifarResNet(8, (8, 16, 16)), 20, generator)
    methods = {"DistPro": DistPro(student, teacher), "MKD": MKD(student, teacher, alpha=0.1)}
    batches = [(data(BATCH, generator), data(BATCH, generator)) for _ in range(BATCHES)]
    print(f"torch {torch.__version__}; worst of {BATCHES} batches: relative error of h (of the training loss, known)")
    for precision, radii in GRIDS.items():
        for scale in (1.0,) if precision != "float32" else (0.1, 1.0, 10.0):
            for name, method in methods.items():
                method = copy.deepcopy(method)
                rescale(method.student, scale)
                truth = [exact(method, pair) for pair in batches]
                cast = torch.float64 if precision == "float64" else torch.float32
                method = method.to(cast)
                pairs = [[(x.to(cast), y) for x, y in pair] for pair in batches]
                print(f"\n{precision}, {name}, weights x{scale:g}\n  radius    forward            central")
                for radius in radii:
                    row = []
                    for tangent in ("forward", "central"):
                        errors, known = [], []
                        for pair, h in zip(pairs, truth):
                            estimate, error = meta_gradient(method, pair, radius, tangent, precision == "bfloat16")
                            errors.append(((estimate - h).norm() / h.norm()).item())
                            known.append(error)
                        row.append(f"{max(errors):.1e} ({max(known):.1e})")
                    print(f"  {radius:.1e}   {'  '.join(row)}")


if __name__ == "__main__":
    main()

"""Cosine and relative error of the meta-gradient against double backward in fp64 (docs/math/hypergradient.md).

    python -m tests.meta.error_table        # about ten minutes on one core

Three heads on two students, trained a little on class prototypes and noise, then ten steps by the method: DistPro's 27
pathways and MKD's temperatures beside a WRN-40-2, MetaDistiller's generator. Batch 64 of 3x32x32; the median of the
pairs of batches. "of the tangent" is relative to double backward in the same fp32 arithmetic.
"""

import copy

import torch
from torch.nn.functional import cosine_similarity

from kdfast.meta import MetaKD, exact_hypergradient
from kdfast.methods import MKD, DistPro, MetaDistiller
from kdfast.models import create
from kdfast.train.loop import ordinary_step
from tests.meta.error_curve import pretrain

CLASSES, BATCH, PAIRS = 100, 64, 3
TANGENTS = {"float32": ("forward", "central", "jvp", "exact"), "bfloat16": ("central", "jvp")}


def batch(generator: torch.Generator):
    prototypes = torch.randn(CLASSES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(CLASSES, (BATCH,), generator=generator)
    return prototypes[targets] + 1.5 * torch.randn(BATCH, 3, 32, 32, generator=generator), targets


def flat(tensors) -> torch.Tensor:
    return torch.cat([x.flatten().double() for x in tensors])


def optimizer_of(distiller):
    return torch.optim.SGD(distiller.inner_parameters(), lr=0.05, momentum=0.9)


def exact(distiller, pair) -> torch.Tensor:
    distiller = copy.deepcopy(distiller).double()
    doubled = [(inputs.double(), targets) for inputs, targets in pair]
    return flat(exact_hypergradient(distiller, *doubled, optimizer_of(distiller)))


def found(distiller, pair, tangent: str, precision: str) -> torch.Tensor:
    distiller = copy.deepcopy(distiller)
    meta_optimizer = torch.optim.SGD(distiller.meta_parameters(), lr=0.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        MetaKD(distiller, optimizer_of(distiller), meta_optimizer, tangent=tangent).step(*pair)
    return flat(p.grad for p in distiller.meta_parameters())


def main():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    train = lambda name, steps: pretrain(create(name, classes=CLASSES), steps, generator, batch)  # noqa: E731
    teacher = train("wrn_40_2", 20)
    pairs = [(batch(generator), batch(generator)) for _ in range(PAIRS)]
    print(f"torch {torch.__version__}; median of {PAIRS} pairs of batches: relative error (cosine)")
    print(
        "| student | head | precision | "
        + " | ".join(TANGENTS["float32"])
        + " | jvp, of the tangent |\n"
        + "|---" * 8
        + "|"
    )
    for name in ("wrn_16_2", "resnet20"):
        student = train(name, 40)
        heads = {
            "27 pathways": DistPro(copy.deepcopy(student), teacher),
            "temperatures": MKD(copy.deepcopy(student), teacher),
            "label generator": MetaDistiller(copy.deepcopy(student)),
        }  # fmt: skip
        for head, distiller in heads.items():
            optimizer = optimizer_of(distiller)
            for _ in range(10):
                ordinary_step(distiller, batch(generator), optimizer)
            truth = [exact(distiller, pair) for pair in pairs]
            for precision, tangents in TANGENTS.items():
                cells, same = [], {}
                for tangent in TANGENTS["float32"]:
                    if tangent not in tangents:
                        cells.append("–")
                        continue
                    hs = [found(distiller, pair, tangent, precision) for pair in pairs]
                    same[tangent] = hs
                    errors = torch.stack([(h - e).norm() / e.norm() for h, e in zip(hs, truth, strict=True)])
                    cosines = torch.stack([cosine_similarity(h, e, dim=0) for h, e in zip(hs, truth, strict=True)])
                    cells.append(f"{errors.median():.1e} ({cosines.median():.6f})")
                cells.append("–")
                if precision == "float32":
                    of_tangent = [(a - b).norm() / b.norm() for a, b in zip(same["jvp"], same["exact"], strict=True)]
                    cells[-1] = f"{torch.stack(of_tangent).median():.1e}"
                print(f"| {name} | {head} | {precision} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

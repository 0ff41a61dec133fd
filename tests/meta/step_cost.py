"""Time of a meta-step against the ordinary step on the same batch (docs/math/hypergradient.md).

python tests/meta/step_cost.py        # one thread, half a minute
"""

import statistics
import time
from functools import partial

import torch

from kdfast.meta import meta_kd_step
from kdfast.methods import MKD, DistPro
from kdfast.models import CifarResNet
from kdfast.train.loop import ordinary_step

ROUNDS, BATCH, WIDTHS = 10, 32, (16, 32, 64)


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train, validation = ((torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))) for _ in range(2))
    teacher = CifarResNet(8, WIDTHS)
    print(f"torch {torch.__version__}, CifarResNet-14, batch {BATCH} of 32x32; median of {ROUNDS}, without the teacher")
    for name, method in {"MKD": MKD, "DistPro": DistPro}.items():
        distiller = method(CifarResNet(14, WIDTHS), teacher)
        optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.01, momentum=0.9)
        meta_optimizer = torch.optim.Adam(distiller.meta_parameters(), lr=1e-3)
        outputs = distiller.teacher_outputs(train[0])
        distiller.teacher_outputs = lambda inputs, outputs=outputs: outputs
        steps = {"ordinary": partial(ordinary_step, distiller, train, optimizer)}
        for commit in ("reuse", "separate"):
            for tangent in ("forward", "central"):
                steps[f"{tangent}, {commit}"] = partial(
                    meta_kd_step,
                    *(distiller, train, validation, optimizer, meta_optimizer),
                    tangent=tangent,
                    commit=commit,
                )
        times = {step: [] for step in steps}
        for _ in range(ROUNDS + 1):  # interleaved, so that drift meets all alike; the first round warms up
            for step, run in steps.items():
                start = time.perf_counter()
                run()
                times[step].append(time.perf_counter() - start)
        for step in steps:
            ratio = statistics.median(a / b for a, b in zip(times[step][1:], times["ordinary"][1:], strict=True))
            print(f"{name:8} {step:18} {1e3 * statistics.median(times[step][1:]):6.0f} ms   x{ratio:.2f}")


if __name__ == "__main__":
    main()

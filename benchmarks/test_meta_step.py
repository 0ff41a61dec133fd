"""A training step with meta-learning against the papers' step, the plain one, and the peers.

    pytest benchmarks --benchmark-only -k meta_step          # minutes; most of it the exact meta-gradient in fp64

WRN-40-2 -> WRN-16-2, batch 64 of 3x32x32, 100 classes, 27 pathways and both temperatures learned, the teacher's outputs
given; networks trained a little on class prototypes and noise. `paper-eager-fp32` is the papers' 5 forwards and 3
backwards in eager PyTorch, contiguous, its head without kdfast's ops, as is the peers'; ours use channels_last.
`plain-kd` is the ordinary step on the same training loss, nothing learned beside. `every5` is a fifth of five steps.

floor: 7 (rolling: 6) forwards of the student alone, timed in the same run. error: of the meta-gradient against double
backward in fp64, of all of it, of the pathways' weights, of the temperatures; central differences where the type is
bf16. quarter's is that of a sample of the batch.

Where there is an NVIDIA GPU the same table is made on it, with reuse as one CUDA graph (`graph`); its
outside_student is the share of its time beyond the student's own two forwards and backwards and its displaced forwards,
recorded as a graph as well.
"""

import copy
import importlib.util
import statistics
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import meta_rivals as rivals
from benchmarks.interleave import enter, measure
from kdfast.meta import MetaKD, exact_hypergradient, graphs
from kdfast.models import create
from kdfast.train.loop import ordinary_step

BATCH, CLASSES, THREADS = 64, 100, 2
OURS = {  # options of MetaKD
    "reuse": {},
    "rolling": {"validation": "rolling"},
    "jvp": {"tangent": "jvp"},
    "quarter": {"fraction": 0.25},
    "every5": {"every": 5},
    "graph": {"cuda_graph": True},
}
IMPLEMENTATIONS = [
    "paper-eager-fp32", "plain-kd-fp32", "plain-kd-bf16", "reuse-fp32", "reuse-bf16", "rolling-fp32", "rolling-bf16",
    "jvp-fp32", "every5-fp32", "every5-bf16", "quarter-bf16", "higher", "torchopt", "betty",
]  # fmt: skip
GRAPHS = ["graph-fp32", "graph-bf16"]
CASES = [pytest.param("cpu", name, id=f"cpu-{name}") for name in IMPLEMENTATIONS] + [
    pytest.param("cuda", name, id=f"cuda-{name}", marks=pytest.mark.cuda) for name in IMPLEMENTATIONS + GRAPHS
]


class Data:
    """Images around a prototype of each class, the same on every device."""

    def __init__(self, device: str):
        self.device = device
        self.generator = torch.Generator().manual_seed(1)
        self.prototypes = torch.randn(CLASSES, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def batch(self):
        targets = torch.randint(CLASSES, (BATCH,), generator=self.generator)
        images = self.prototypes[targets] + 1.5 * torch.randn(BATCH, 3, 32, 32, generator=self.generator)
        return images.to(self.device), targets.to(self.device)


class Step:
    """One implementation with a copy of the state all begin from."""

    def __init__(self, name: str, distiller, train, validation, optimizer_state, device: str):
        method, _, dtype = name.rpartition("-")
        self.distiller = copy.deepcopy(distiller)
        if method not in ("", "paper-eager"):
            self.distiller.to(memory_format=torch.channels_last)
            train, validation = ((x.contiguous(memory_format=torch.channels_last), y) for x, y in (train, validation))
        self.bf16 = dtype == "bf16"
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=self.bf16)
        self.optimizer = torch.optim.SGD(self.distiller.inner_parameters(), lr=rivals.LR, momentum=rivals.MOMENTUM)
        self.optimizer.load_state_dict(copy.deepcopy(optimizer_state))
        self.meta_optimizer = torch.optim.SGD(self.distiller.meta_parameters(), lr=0.0)
        self.train, self.validation = train, validation
        with self.autocast:
            self.taught = self.distiller.teacher_outputs(train[0])
        self.calls = 5 if method == "every5" else 1
        self.run = getattr(self, f"_{method.partition('-')[0] or name}", None) or self._meta(method)

    def meta_gradient(self) -> torch.Tensor | None:
        gradients = [p.grad for p in self.distiller.meta_parameters()]
        return None if gradients[0] is None else torch.cat([h.flatten() for h in gradients]).double()

    def _meta(self, method: str) -> Callable[[], None]:
        engine = MetaKD(self.distiller, self.optimizer, self.meta_optimizer, **OURS[method])
        turn = [0]

        def run():
            with self.autocast:
                for _ in range(self.calls):
                    # rolling: the second of two batches is the first one's validation
                    batch = self.train if method != "rolling" or turn[0] % 2 == 0 else self.validation
                    turn[0] += 1
                    engine.step(batch, self.validation, teacher_outputs=self.taught)

        return run

    def _plain(self):
        with self.autocast:
            self.distiller.teacher_outputs = lambda inputs: self.taught
            ordinary_step(self.distiller, self.train, self.optimizer)

    def _paper(self):
        rivals.Paper(self.distiller, self.optimizer, self.meta_optimizer).step(self.train, self.validation, self.taught)

    def _peer(self, step):
        step(self.distiller, self.optimizer, self.meta_optimizer, self.train, self.validation, self.taught)

    def _higher(self):
        self._peer(rivals.higher_step)

    def _torchopt(self):
        self._peer(rivals.torchopt_step)

    def _betty(self):
        if not hasattr(self, "engine"):
            self.engine = rivals.Betty(
                self.distiller, self.optimizer, self.meta_optimizer, self.train, self.validation, self.taught
            )
        self.engine.step()

    def _forward(self):
        with self.autocast, torch.no_grad():
            self.distiller.student(self.train[0])

    def _student(self):
        """The student's passes of a step, and nothing else, as a graph."""
        if not hasattr(self, "replay"):
            stream = torch.cuda.Stream()
            for _ in range(graphs.WARMUP):
                graphs.beside(self._passes, stream)
            self.replay = graphs.record(self._passes, stream)
        self.replay()

    def _passes(self):
        student, ahead = self.distiller.student, 2 if self.bf16 else 1
        with self.autocast:
            for inputs, targets in (self.train, self.validation):
                student.zero_grad()
                logits, features = student(inputs, features=True)
                (cross_entropy(logits, targets) + sum(f.float().square().mean() for f in features)).backward()
            with torch.no_grad():
                for _ in range(ahead):
                    student(self.train[0])
        torch.clear_autocast_cache()


def trained(network, data: Data, steps: int):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        inputs, targets = data.batch()
        optimizer.zero_grad()
        cross_entropy(network(inputs), targets).backward()
        optimizer.step()
    return network


Measured = dict[str, tuple[list[float], tuple[float, float, float] | None]]
_measured: dict[str, Measured] = {}


def measured(device: str) -> Measured:
    """Seconds a step and the meta-gradient's error of every implementation, all in one interleaved run."""
    if device in _measured:
        return _measured[device]
    results: Measured = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        torch.manual_seed(0)
        data = Data(device)  # a GPU makes the networks and the exact meta-gradient too: on a CPU that takes minutes
        teacher = trained(create("wrn_40_2", classes=CLASSES).to(device), data, 20)
        student = trained(create("wrn_16_2", classes=CLASSES).to(device), data, 40)
        distiller = rivals.PathwaysAndTemperatures(student, teacher).to(device)
        optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=rivals.LR, momentum=rivals.MOMENTUM)
        for _ in range(10):
            ordinary_step(distiller, data.batch(), optimizer)
        train, validation = data.batch(), data.batch()
        exact = truth(distiller, train, validation, optimizer.state_dict()).cpu()
        names = [n for n in IMPLEMENTATIONS if n not in ("higher", "torchopt", "betty") or importlib.util.find_spec(n)]
        names += ["forward-fp32", "forward-bf16"]
        names += [*GRAPHS, "student-fp32", "student-bf16"] if device == "cuda" else []
        steps = {name: Step(name, distiller, train, validation, optimizer.state_dict(), device) for name in names}
        errors = {}
        for name, step in steps.items():
            for _ in range(2 if name.startswith("rolling") else 1):
                step.run()
            h = None if name.startswith(("forward", "plain", "student")) else step.meta_gradient()
            errors[name] = None if h is None else relative(h.cpu(), exact)
        rounds = measure(
            ("meta_step", device),
            {name: step.run for name, step in steps.items()},
            seconds=60.0,
            sync=device == "cuda",
            warmup=1 if device == "cpu" else graphs.WARMUP + 1,
        )
        for name, seconds in rounds.items():
            results[name] = [t / steps[name].calls for t in seconds], errors[name]
    finally:
        torch.set_num_threads(threads)
    _measured[device] = results
    return results


def relative(h: torch.Tensor, exact: torch.Tensor) -> tuple[float, float, float]:
    """The error of all of it, of the pathways' weights, of the two temperatures."""
    ends = (0, len(h)), (0, len(h) - 2), (len(h) - 2, len(h))
    return tuple(((h - exact)[a:b].norm() / exact[a:b].norm()).item() for a, b in ends)


def truth(distiller, train, validation, state) -> torch.Tensor:
    double = copy.deepcopy(distiller).double()
    optimizer = torch.optim.SGD(double.inner_parameters(), lr=rivals.LR, momentum=rivals.MOMENTUM)
    optimizer.load_state_dict(copy.deepcopy(state))
    batches = [(x.double(), y) for x, y in (train, validation)]
    return torch.cat([h.flatten() for h in exact_hypergradient(double, *batches, optimizer)])


@pytest.mark.timeout(0)  # the first of them times all
@pytest.mark.parametrize(("device", "implementation"), CASES)
def test_meta_step(benchmark, device, implementation):
    found = measured(device)
    if implementation not in found:
        pytest.skip(f"{implementation} is not installed")
    seconds, error = found[implementation]
    dtype = "bf16" if implementation.endswith("bf16") else "fp32"
    plain, forward = (statistics.median(found[f"{name}-{dtype}"][0]) for name in ("plain-kd", "forward"))
    passes = 6 if implementation.startswith("rolling") else 7
    median = statistics.median(seconds)
    ratios = {}
    if implementation in GRAPHS:
        ratios["outside_student"] = 1 - statistics.median(found[f"student-{dtype}"][0]) / median
    enter(
        benchmark, seconds, op="meta_step", case="wrn_40_2-wrn_16_2", impl=implementation, dtype=dtype, device=device,
        threads=THREADS, errors=error, times_plain_kd=median / plain, times_floor=median / (passes * forward),
        times_paper=statistics.median(a / b for a, b in zip(seconds, found["paper-eager-fp32"][0], strict=True)),
        **ratios,
    )  # fmt: skip

"""Two processes with half a batch each are one with the whole."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.optim import SGD

from kdfast.meta import MetaKD, processes
from tests.meta.conftest import batch, distiller

STEPS = 3
CASES = [
    ("pathways", {}), ("temperatures", {}), ("pathways", {"validation": "rolling"}), ("pathways", {"commit": "rehead"}),
    ("temperatures", {"max_norm": 0.05}), ("temperatures", {"commit": "separate", "tangent": "jvp"}),
]  # fmt: skip


def start(head):
    """A distiller and batches, the same in every process; no BatchNorm, which would take each half's statistics."""
    torch.manual_seed(0)
    made = distiller(head, norm=False)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return made, [(batch(), batch()) for _ in range(STEPS)]


def train(made, batches, share, options):
    optimizer = SGD(made.inner_parameters(), lr=0.1, momentum=0.9)
    engine = MetaKD(made, optimizer, SGD(made.meta_parameters(), lr=1.0), **options)
    for pair in batches:
        (inputs, targets), validation = (tuple(x[share] for x in part) for part in pair)
        report = engine.step((inputs, targets), None if options.get("validation") == "rolling" else validation)
    h = torch.cat([p.grad.flatten() for p in made.meta_parameters()])
    return {"h": h, "error": report.tangent_error, **{k: x.detach().clone() for k, x in made.state_dict().items()}}


def process(rank, folder, case):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        for i in range(len(CASES)) if case is None else [case]:
            head, options = CASES[i]
            torch.save(train(*start(head), slice(rank, None, 2), options), f"{folder}/{rank}-{i}.pt")
        tensors = [torch.full((2,), float(rank)), None if rank else torch.ones(3), None]
        mean = processes.average(tensors, [torch.zeros(2), torch.zeros(3), torch.zeros(1)])
        torch.save(mean, f"{folder}/{rank}-mean.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    mp.spawn(process, (str(path), None), nprocs=2)
    return path


@pytest.mark.parametrize(
    "case", range(len(CASES)), ids=lambda i: f"{CASES[i][0]}-{'-'.join(map(str, CASES[i][1].values()))}"
)
def test_two_processes_are_one_with_the_whole_batch(case, folder, double):
    head, options = CASES[case]
    made, batches = start(head)
    alone = train(copy.deepcopy(made), batches, slice(None), options)
    ranks = [torch.load(folder / f"{rank}-{case}.pt") for rank in range(2)]
    for name, expected in alone.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        if name != "error":
            torch.testing.assert_close(
                ranks[0][name], expected, rtol=1e-5, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_what_one_process_lacks_counts_as_zero(folder):
    for rank in range(2):
        half, lacking, nowhere = torch.load(folder / f"{rank}-mean.pt")
        assert torch.equal(half, torch.full((2,), 0.5).double())
        assert torch.equal(lacking, torch.full((3,), 0.5).double())
        assert nowhere is None


def test_alone_nothing_is_averaged():
    x = torch.ones(2)
    assert processes.average([x, None], [x, x]) == [x, None]

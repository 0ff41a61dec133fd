"""What every GPU version of pathways has to get right: cases, inputs, the truth, and the comparison.

The functions under test are the three kernels with the arguments of the ops' schemas (`Kernels`). They are Triton's
launchers (on a GPU, or interpreted on a CPU), the dispatcher's, or the CUDA kernels run on a CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kdfast.reference.kd_kl import accumulate_dtype
from kdfast.reference.pathways import ATTENTION, BILINEAR, HCL, L1, MSE, NEAREST
from kdfast.reference.pathways import pathways as definition

NAMES = {MSE: "mse", L1: "l1", HCL: "hcl", ATTENTION: "attention"}
NAN = float("nan")


class Kernels(NamedTuple):
    forward: Callable
    backward: Callable
    value_and_grad: Callable


class Pair(NamedTuple):
    """Sizes: the student's height and width are the teacher's where not given, and so are the channels."""

    samples: int
    channels: int
    height: int
    width: int
    resized_from: tuple[int, int] | None = None
    teacher_channels: int | None = None
    layout: str = "cc"  # of student and teacher: c contiguous, l channels_last


@dataclass(frozen=True)
class Case:
    """One call: its regime in a word, its pairs, and how they are compared."""

    regime: str
    pairs: tuple[Pair, ...]
    distance: int = HCL
    resize: int = NEAREST
    dtype: torch.dtype = torch.float32
    dropped: tuple[int, ...] = ()  # pathways that `keep` drops; their maps hold NaN
    offset: int = 0  # elements the maps start after a 16-byte boundary
    expanded: bool = False  # grad is one number for all pathways

    def __str__(self) -> str:
        return f"{self.regime}-{NAMES[self.distance]}-{str(self.dtype).removeprefix('torch.')}"


def _squares(*sizes: tuple[int, int, int], **kwargs) -> tuple[Pair, ...]:
    return tuple(Pair(n, c, side, side, **kwargs) for n, c, side in sizes)


# Stages of residual networks, and every way to cut a plane: sides that 4 divides, that 2 divides, odd ones, down to 1.
STAGES = _squares((2, 3, 32), (2, 5, 16), (2, 9, 8), (1, 4, 4))
SIDES = (
    *_squares((2, 3, 14), (3, 7, 7), (2, 3, 6), (2, 5, 5), (2, 3, 3), (2, 5, 2), (2, 3, 1)),
    *(Pair(2, 3, *sides) for sides in ((8, 1), (9, 2), (6, 3), (1, 6), (3, 8), (12, 20))),
)
CHANNELS_LAST = (
    Pair(2, 16, 8, 8, layout="ll"), Pair(1, 24, 7, 5, layout="ll"), Pair(2, 3, 14, 14, layout="ll"),
    Pair(2, 8, 8, 8, layout="lc"), Pair(2, 5, 7, 7, layout="cl"), Pair(2, 6, 1, 1, layout="lc"),
)  # fmt: skip
RESIZED = (
    Pair(2, 3, 8, 8, (4, 4)), Pair(1, 3, 14, 7, (7, 14)), Pair(2, 2, 7, 7, (14, 14)), Pair(2, 3, 8, 8),
    Pair(1, 5, 4, 4, (9, 10), layout="ll"), Pair(1, 3, 10, 6, (3, 7), layout="cl"),
    Pair(1, 2, 5, 5, (1, 1)), Pair(1, 2, 1, 1, (6, 5)),
)  # fmt: skip
OTHER_CHANNELS = (
    Pair(2, 4, 8, 8, teacher_channels=7), Pair(2, 16, 8, 8, teacher_channels=8, layout="ll"),
    Pair(1, 3, 7, 5, teacher_channels=5, layout="cl"), Pair(1, 40, 3, 3, teacher_channels=9, layout="ll"),
    Pair(2, 3, 4, 4, (8, 6), 2), Pair(1, 3, 20, 20),
)  # fmt: skip
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

CASES = [
    *(Case("stages", STAGES, dtype=dtype) for dtype in DTYPES),
    *(Case("sides", SIDES, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)),
    *(Case("channels_last", CHANNELS_LAST, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)),
    *(Case("stages", STAGES[1:], distance, dtype=dtype) for distance in (MSE, L1) for dtype in DTYPES[::2]),
    *(Case("channels_last", CHANNELS_LAST, distance) for distance in (MSE, L1)),
    *(Case("nearest", RESIZED, distance) for distance in (MSE, HCL)),
    *(Case("bilinear", RESIZED, distance, BILINEAR) for distance in (MSE, L1, HCL)),
    Case("bilinear", RESIZED, HCL, BILINEAR, torch.bfloat16),
    Case("bilinear", RESIZED, HCL, BILINEAR, torch.float64),
    *(Case("channels", OTHER_CHANNELS, ATTENTION, dtype=dtype) for dtype in DTYPES),
    Case("bilinear", OTHER_CHANNELS, ATTENTION, BILINEAR),
    *(Case("dropped", (*STAGES[1:], Pair(2, 4, 8, 8, (4, 4))), distance, dropped=(0, 2, 3)) for distance in range(4)),
    *(Case("unaligned", STAGES[1:] + CHANNELS_LAST[:1], distance, offset=1) for distance in (MSE, HCL, ATTENTION)),
    Case("one gradient", STAGES[2:], expanded=True),
    Case("many", _squares((1, 2, 4)) * 67, dropped=(5, 40, 66)),
]

# What is compiled, not run, for GPUs: the tiles of usual maps, each with its kernels' ways of reading.
TO_COMPILE = [
    Case("stages", (Pair(8, 32, 32, 32), Pair(8, 16, 8, 8), Pair(2, 64, 56, 56))),
    Case("channels_last", (Pair(8, 64, 16, 16, layout="ll"),), dtype=torch.bfloat16),
    Case("fp64", (Pair(8, 16, 7, 7),), dtype=torch.float64, dropped=(0,)),
    Case("stages", (Pair(8, 32, 32, 32),), L1, dtype=torch.float16),
    Case("bilinear", (Pair(8, 32, 16, 16, (8, 8)),), HCL, BILINEAR),
    Case("nearest", (Pair(8, 32, 8, 8, (16, 16)),), HCL, NEAREST),
    Case("channels", (Pair(8, 32, 8, 8, teacher_channels=64),), ATTENTION),
    Case("bilinear", (Pair(8, 32, 16, 16, (8, 8)),), ATTENTION, BILINEAR, torch.bfloat16),
]


def make(case: Case, device="cpu") -> tuple[list, list, torch.Tensor | None, torch.Tensor]:
    """(students, teachers, keep, grad [pathways])."""
    generator = torch.Generator().manual_seed(0)
    maps: tuple[list, list] = ([], [])
    for p, pair in enumerate(case.pairs):
        size = pair.height, pair.width
        for i, (channels, sides) in enumerate(
            ((pair.channels, pair.resized_from or size), (pair.teacher_channels or pair.channels, size))
        ):
            x = torch.randn(pair.samples, channels, *sides, generator=generator, dtype=torch.float64).to(case.dtype)
            if pair.layout[i] == "l":
                x = x.contiguous(memory_format=torch.channels_last)
            if p in case.dropped:
                x.fill_(NAN)
            at = torch.cat([x.new_zeros(case.offset), x.new_empty(x.numel())]).to(device)[case.offset :]
            at = at.as_strided(x.shape, x.stride(), case.offset)
            maps[i].append(at.copy_(x))
    count = len(case.pairs)
    keep = None
    if case.dropped:
        keep = torch.tensor([p not in case.dropped for p in range(count)]).to(device)
    accumulate = accumulate_dtype(case.dtype)
    grad = torch.linspace(-1.5, 2.0, count, dtype=accumulate) * 100  # so that no gradient is subnormal in fp16
    if case.expanded:
        grad = torch.tensor([70.0], dtype=accumulate).to(device).expand(count)
    return *maps, keep, grad.to(device)


def truth(case: Case, students, teachers, keep, grad) -> tuple[torch.Tensor, list, list]:
    """(distances, gradients in the students, in the teachers), in fp64. What `keep` hides may be NaN, and is 0 here."""
    leaves = [[x.double().cpu().nan_to_num().requires_grad_() for x in maps] for maps in (students, teachers)]
    distances = definition(*leaves, None if keep is None else keep.cpu(), case.distance, case.resize)
    used = [x for maps in leaves for x in maps]
    gradients = torch.autograd.grad((distances * grad.double().cpu()).sum(), used)
    count = len(students)
    return distances.detach(), list(gradients[:count]), list(gradients[count:])


def check(case: Case, kernels: Kernels, device="cpu", truncates: bool = False) -> None:
    """Values and gradients against fp64. `truncates`: what is stored in bf16 was cut off rather than rounded."""
    students, teachers, keep, grad = make(case, device)
    options = keep, case.distance, case.resize
    want = truth(case, students, teachers, keep, grad)
    distances = kernels.forward(students, teachers, *options)
    by_student, by_teacher = kernels.backward(grad, students, teachers, *options, True, True)
    again, by_student_too = kernels.value_and_grad(students, teachers, grad, *options)
    assert distances.dtype == accumulate_dtype(case.dtype)
    accumulate = torch.finfo(distances.dtype).eps
    close(distances, want[0], 64 * accumulate, 0.0)  # thousands of terms, added in trees
    close(again, want[0], 64 * accumulate, 0.0)
    stored = torch.finfo(case.dtype).eps * (1 if truncates else 0.5)
    for ours, exact, maps in (
        (by_student, want[1], students), (by_teacher, want[2], teachers), (by_student_too, want[1], students)
    ):  # fmt: skip
        assert len(ours) == len(maps)
        for g, t, x in zip(ours, exact, maps, strict=True):
            assert (g.shape, g.stride(), g.dtype) == (x.shape, x.stride(), x.dtype)
            # One rounding to the storage type, and of the arithmetic a few in the size of the largest element; of
            # resizing, what rounding a position of that many pixels leaves of its weights, as in PyTorch's own.
            roundings = 32 + (max(x.shape[2:]) if case.resize == BILINEAR else 0)
            smallest = 2.0**-24 if case.dtype == torch.float16 else 0.0
            close(g, t, stored, roundings * accumulate * (t.abs().max().item() if t.numel() else 0.0) + smallest)
    only = kernels.backward(grad, students, teachers, *options, False, True)
    assert only[0] == []
    for g, t in zip(only[1], by_teacher, strict=True):
        torch.testing.assert_close(g, t, rtol=0, atol=0)


def close(ours: torch.Tensor, exact: torch.Tensor, rtol: float, atol: float) -> None:
    assert exact.isfinite().all(), "a case must have a finite truth"
    torch.testing.assert_close(ours.detach().double().cpu(), exact, rtol=rtol, atol=atol)


# ---------------------------------------------------------------- the edges, each a function of the kernels
def shared_teachers(kernels: Kernels, device="cpu") -> None:
    """One teacher's map, many times in the list."""
    students, teachers, _, grad = make(Case("shared", _squares((2, 3, 8)) * 3), device)
    ours = kernels.forward(students, [teachers[0]] * 3, None, HCL, NEAREST)
    want = [kernels.forward([x], teachers[:1], None, HCL, NEAREST)[0] for x in students]
    torch.testing.assert_close(ours, torch.stack(want), rtol=1e-6, atol=0)
    by_student, _ = kernels.backward(grad, students, [teachers[0]] * 3, None, HCL, NEAREST, True, False)
    exact = truth(Case("shared", ()), students, [teachers[0]] * 3, None, grad)[1]
    for g, t in zip(by_student, exact, strict=True):
        close(g, t, 1e-5, 1e-6)


def equal_maps_are_zero_apart(kernels: Kernels, device="cpu") -> None:
    students, _, _, grad = make(Case("equal", STAGES[1:]), device)
    for distance in range(4):
        assert (kernels.forward(students, students, None, distance, NEAREST) == 0).all()
        gradients = kernels.backward(grad[:3], students, students, None, distance, NEAREST, True, True)
        for g in (x for half in gradients for x in half):
            assert (g == 0).all()


def attention_of_nothing_is_zero(kernels: Kernels, device="cpu") -> None:
    """A map of zeros has the normalised map 0, and gradient 0; the other one's gradient is finite."""
    students, teachers, _, grad = make(Case("zero", STAGES[2:]), device)
    students[0].zero_(), teachers[1].zero_()
    distances = kernels.forward(students, teachers, None, ATTENTION, NEAREST)
    close(distances, definition([x.double().cpu() for x in students], [x.double().cpu() for x in teachers],
                                None, ATTENTION), 1e-5, 0.0)  # fmt: skip
    by_student, by_teacher = kernels.backward(grad[:2], students, teachers, None, ATTENTION, NEAREST, True, True)
    assert (by_student[0] == 0).all()
    assert (by_teacher[1] == 0).all()
    for g in (*by_student, *by_teacher):
        assert g.isfinite().all()


def bad_values_stay_in_their_pathway(kernels: Kernels, device="cpu") -> None:
    students, teachers, _, grad = make(Case("bad", STAGES[1:]), device)
    students[1][0, 0, 0, 0] = NAN
    for distance in range(4):
        distances = kernels.forward(students, teachers, None, distance, NEAREST)
        assert distances.isnan().tolist() == [False, True, False]
        by_student, _ = kernels.backward(grad, students, teachers, None, distance, NEAREST, True, False)
        assert by_student[0].isfinite().all()
        assert by_student[2].isfinite().all()


def nothing_to_do(kernels: Kernels, device="cpu") -> None:
    """No samples, or no channels: the distance is 0, the gradient empty."""
    students, teachers, _, grad = make(Case("empty", (Pair(0, 3, 8, 8), *STAGES[2:3], Pair(2, 0, 8, 8))), device)
    for distance in range(4):
        distances = kernels.forward(students, teachers, None, distance, NEAREST)
        assert (distances == 0).tolist() == [True, False, True]
        by_student, _ = kernels.backward(grad, students, teachers, None, distance, NEAREST, True, False)
        assert [x.shape for x in by_student] == [x.shape for x in students]


EDGES = [
    shared_teachers,
    equal_maps_are_zero_apart,
    attention_of_nothing_is_zero,
    bad_values_stay_in_their_pathway,
    nothing_to_do,
]

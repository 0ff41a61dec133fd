"""What every version of kd_kl_topk has to get right: cases, inputs, the truth, and the comparison.

The functions under test have the arguments of the op's schema: `forward(...) -> (loss, stats)`, `backward(...) -> ds`.
"""

from dataclasses import dataclass

import torch

from kdfast.reference.kd_kl import accumulate_dtype
from kdfast.reference.kd_kl_topk import kd_kl_topk as definition
from tests.ops.kd_kl_cases import compare

INF = float("inf")


@dataclass(frozen=True)
class Case:
    regime: str
    rows: int
    classes: int
    k: int
    dtype: torch.dtype = torch.float32
    temperature: str = ""  # "", "one", "rows": a number, or a tensor of one value or one a row
    weight: bool = False
    ignored: bool = False
    sharpness: float = 5.0  # of the teacher's logits
    spread: float = 5.0  # of the student's
    masked: bool = False  # some of the student's tail, and some listed classes of the teacher's without probability

    def __str__(self) -> str:
        return f"{self.regime}-{self.rows}x{self.classes}-{self.k}-{str(self.dtype).removeprefix('torch.')}"


CASES = [
    Case("plain", 3, 37, 5),
    Case("tau_one", 4, 50, 8, temperature="one", weight=True),
    Case("tau_rows", 4, 50, 3, temperature="rows", ignored=True),
    Case("one_listed", 3, 20, 1, temperature="one"),
    Case("all_listed", 3, 20, 20, temperature="one"),
    Case("all_but_one", 3, 20, 19, temperature="one"),
    Case("one_class", 3, 1, 1),
    Case("masked", 4, 40, 6, masked=True, temperature="rows"),
    Case("sure_teacher", 4, 40, 2, sharpness=60.0),  # p_tail of 1e-10 and less
    Case("sure_student", 4, 40, 4, spread=300.0, temperature="one"),  # one of the two parts underflows beside the other
    Case("bf16", 3, 64, 4, torch.bfloat16, temperature="one"),
    Case("bf16_odd", 3, 45, 4, torch.bfloat16, weight=True),
    Case("fp16", 3, 61, 6, torch.float16, ignored=True),
    Case("fp64", 3, 31, 4, torch.float64, temperature="rows", weight=True),
    Case("fp64_sure", 3, 31, 2, torch.float64, sharpness=60.0),
    Case("many_rows", 130, 7, 3, ignored=True),
    Case("1000", 3, 1000, 20, temperature="rows"),
    Case("wide", 2, 9001, 64, temperature="rows"),
    Case("wide_bf16", 2, 8200, 33, torch.bfloat16, temperature="one"),
    Case("wide_fp64", 2, 4099, 100, torch.float64, temperature="one"),
    Case("very_wide", 2, 140001, 50, torch.bfloat16),
]


def make(case: Case, device="cpu") -> tuple:
    """(student, log_probs, indices, tau, labels, weight) of a case, the same on every device."""
    generator = torch.Generator().manual_seed(case.rows * 1009 + case.classes)
    accumulate = accumulate_dtype(case.dtype)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student, teacher = case.spread * normal(case.rows, case.classes), case.sharpness * normal(case.rows, case.classes)
    log_probs, indices = (teacher / 4).log_softmax(-1).topk(case.k, -1)
    order = torch.rand(case.rows, case.k, generator=generator).argsort(-1)  # not likeliest first
    log_probs, indices = log_probs.gather(-1, order), indices.gather(-1, order)
    if case.masked:
        hidden = torch.rand(case.rows, case.classes, generator=generator) < 0.3
        student[hidden.scatter(-1, indices, False)] = -INF
        log_probs[:, 1] = -INF
        student.scatter_(-1, indices[:, 1:2], -INF)
    labels = torch.zeros(case.rows, dtype=torch.int64)
    labels[::3] = -100
    tau = None
    if case.temperature:
        size = case.rows if case.temperature == "rows" else 1
        tau = 1 + 3 * torch.rand(size, generator=generator, dtype=torch.float64)
    weight = torch.rand(case.rows, generator=generator, dtype=torch.float64)
    return (
        student.to(device, case.dtype),
        log_probs.to(device, accumulate),
        indices.to(device),
        None if tau is None else tau.to(device, accumulate),
        labels.to(device) if case.ignored else None,
        weight.to(device, accumulate) if case.weight else None,
    )


def autograd(tensors, grad, dtype=None):
    """[loss, ds, dtau per row] as PyTorch derives the definition, in `dtype` or the inputs' own."""
    rows = tensors[0].shape[0]
    inputs = [x if x is None or not x.is_floating_point() else x.detach().to(dtype or x.dtype) for x in tensors]
    student = inputs[0].requires_grad_()
    tau = None if inputs[3] is None else inputs[3].expand(rows).clone().requires_grad_()
    loss = definition(student, *inputs[1:3], tau, *inputs[4:], 4.0)
    leaves = [student] if tau is None else [student, tau]
    grads = torch.autograd.grad(loss, leaves, grad.to(loss.dtype))
    return [loss.detach(), *grads]


def check(case: Case, forward, backward, device="cpu", truncates=False) -> None:
    tensors = make(case, device)
    grad = torch.linspace(-1.5, 2.0, case.rows, dtype=accumulate_dtype(case.dtype)).to(device)
    exact, theirs = autograd(tensors, grad, torch.float64), autograd(tensors, grad)
    loss, stats = forward(*tensors, 4.0, -100, tensors[3] is not None)
    ours = [loss, backward(grad, *tensors, stats, 4.0, -100)]
    if tensors[3] is not None:
        ours.append(grad * stats[:, 4])
    student = tensors[0].double()
    distance = (student - student.amax(-1, keepdim=True)).masked_fill(student == -INF, 0).abs()
    for name, x, e, t in zip(("loss", "student", "temperature"), ours, exact, theirs, strict=False):
        assert x.shape == t.shape, name
        assert x.dtype == t.dtype, name
        # A log ratio is a difference of logits over tau, times tau^2; a temperature's gradient is their sum.
        magnitude = e.abs().max().item()
        if name != "student":
            magnitude += (exact[1].abs() * distance).sum(-1).max().item() + 4 * (distance.max().item() < 1e4)
        compare(name, x, e, t, magnitude, truncates)


def edge_rows_left_out_and_out_of_range(forward, backward, device="cpu"):
    """An ignored row is 0 whatever it holds; an index that is no class makes its row NaN, and touches nothing else."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 20, generator=generator).to(device)
    student[0] = torch.nan
    log_probs = torch.full((4, 2), 0.25, device=device).log()
    indices = torch.tensor([[0, 99], [1, 20], [-1, 3], [4, 19]], device=device)
    labels = torch.tensor([-100, 0, 1, 2], device=device)
    args = (student, log_probs, indices, None, labels, None)
    loss, stats = forward(*args, 2.0, -100, False)
    ds = backward(torch.ones_like(loss), *args, stats, 2.0, -100)
    assert loss[0] == 0
    assert ds[0].eq(0).all()
    assert loss[1:3].isnan().all()
    assert ds[1:3].isnan().all()
    assert loss[3].isfinite()
    assert ds[3].isfinite().all()


def edge_a_tail_only_the_student_masks(forward, backward, device="cpu"):
    student = torch.full((1, 20), -INF, device=device)
    student[:, :2] = 0
    indices = torch.tensor([[0, 1]], device=device)
    for probabilities, infinite in (((0.5, 0.25), True), ((0.5, 0.5), False)):
        log_probs = torch.tensor([probabilities], device=device).log()
        loss, _ = forward(student, log_probs, indices, None, None, None, 2.0, -100, False)
        assert loss.isinf().all() == infinite
        assert not loss.isnan().any()


def edge_no_rows(forward, backward, device="cpu"):
    args = (torch.empty(0, 5, device=device), torch.empty(0, 2, device=device),
            torch.empty(0, 2, dtype=torch.int64, device=device), None, None, None)  # fmt: skip
    loss, stats = forward(*args, 1.0, -100, False)
    assert loss.shape == (0,)
    assert backward(loss, *args, stats, 1.0, -100).shape == (0, 5)


EDGES = [edge_rows_left_out_and_out_of_range, edge_a_tail_only_the_student_masks, edge_no_rows]

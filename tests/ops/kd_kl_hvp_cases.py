"""What every version of kd_kl_hvp has to get right: the cases of kd_kl, a direction, the truth, and the comparison.

The function under test has the arguments of the op's schema. It is the dispatcher's op or Triton's launcher.
"""

import torch

from kdfast.reference.kd_kl import Options, accumulate_dtype
from kdfast.reference.kd_kl import kd_kl as definition
from kdfast.reference.kd_kl import kd_kl_hvp as composed
from tests.ops.kd_kl_cases import CASES as EVERY_CASE
from tests.ops.kd_kl_cases import NAMES, compare, make

__all__ = ["CASES", "DIRECTIONS", "EDGES", "check", "truth"]

# The kernel is for the three plain divergences of logits as they are; the op is never called for the others.
CASES = [c for c in EVERY_CASE if c.options.divergence < 3 and c.options.softcap == 0 and c.options.logit_scale == 1]

# Which of (student, teacher, temperature, temperature) the direction has; the rest is absent.
DIRECTIONS = {"all": (1, 1, 1, 1), "student": (1, 0, 0, 0), "teacher": (0, 1, 0, 0), "temperatures": (0, 0, 1, 1)}


def direction(tensors, given, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        None if x is None or not g else torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        for x, g in zip(tensors[:4], given, strict=True)
    )


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def truth(tensors, options: Options, w) -> list:
    """The definition, differentiated twice by PyTorch in fp64: per row, and None where there is nothing to differ."""
    rows = tensors[0].shape[0]
    inputs = [wide(x) for x in tensors]
    leaves = [x if x is None or x.dim() == 2 else x.expand(rows).clone() for x in inputs[:4]]
    leaves = [None if x is None else x.detach().requires_grad_() for x in leaves]
    loss = definition(*leaves, *inputs[4:], options).sum()
    there = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(loss, there, create_graph=True, allow_unused=True, materialize_grads=True)
    given = [wide(v) for x, v in zip(leaves, w, strict=True) if x is not None]
    along = sum(
        (g * (v if v.dim() == 2 else v.expand(rows))).sum() for g, v in zip(grads, given, strict=True) if v is not None
    )
    if not isinstance(along, torch.Tensor) or not along.requires_grad:
        return [None if x is None else torch.zeros_like(x) for x in leaves]
    second = iter(torch.autograd.grad(along, there, allow_unused=True, materialize_grads=True))
    return [None if x is None else next(second) for x in leaves]


def check(case, kernel, device="cpu", truncates=False):
    """At most twice the error of the composed formula in the same types, against fp64."""
    tensors = make(case, device)
    for given in DIRECTIONS.values():
        w = direction(tensors, given)
        ours = kernel(*tensors, *w, *case.options, True, True)
        exact = truth(tensors, case.options, w)
        theirs = composed(*tensors, case.options, direction=w)
        for name, x, e, t in zip(NAMES, ours, exact, theirs, strict=True):
            if e is None:
                assert x.numel() == 0, name
                continue
            narrow = name in ("student", "teacher")
            assert x.shape == e.shape, name
            assert x.dtype == (case.dtype if narrow else accumulate_dtype(case.dtype)), name
            # What a number is made of: a product of probabilities up to 1 with log ratios and their changes that all
            # but cancel, and for a temperature a sum over the row of such products times distances between logits.
            magnitude = e.abs().max().item() + 1
            if not narrow:
                i = NAMES.index(name) - 2
                distance = (tensors[i].double() - tensors[i].double().amax(-1, keepdim=True)).masked_fill(
                    tensors[i] == -torch.inf, 0
                )
                magnitude += ((exact[i] * distance).abs().sum(-1) / tensors[i + 2].double()).max().item()
            compare(name, x, e, t.to(x.dtype), magnitude, truncates)


def edge_only_what_is_wanted(kernel, device="cpu"):
    case = CASES[0]
    tensors = make(case, device)
    w = direction(tensors, DIRECTIONS["all"])
    both = kernel(*tensors, *w, *case.options, True, True)
    for wanted in ((True, False), (False, True), (False, False)):
        got = kernel(*tensors, *w, *case.options, *wanted)
        for x, y, keep in zip(got[:2], both[:2], wanted, strict=True):
            torch.testing.assert_close(x, y if keep else y.new_empty(0), rtol=0, atol=0)


def edge_rows_left_out_and_out_of_range(kernel, device="cpu"):
    """An ignored row is 0 whatever it holds; a label that is no class makes its row NaN."""
    options = Options(2.0, 3.0, 0.5)
    generator = torch.Generator().manual_seed(0)
    s, t, w = (torch.randn(3, 20, generator=generator).to(device) for _ in range(3))
    s[0], t[0] = torch.nan, torch.inf
    labels = torch.tensor([-100, 20, 4], device=device)
    tau = torch.full((1,), 2.0, device=device)
    for h in kernel(s, t, tau, tau, labels, None, None, w, w, None, None, *options, True, True):
        h = h.reshape(3, -1)
        assert h[0].eq(0).all()
        assert h[1].isnan().all()
        assert h[2].isfinite().all()


def edge_no_rows(kernel, device="cpu"):
    none = torch.empty(0, 5, device=device)
    for h in kernel(none, none, *(None,) * 5, none, none, None, None, *Options(), True, True)[:2]:
        assert h.shape == (0, 5)


def edge_a_class_only_the_other_masks(kernel, device="cpu"):
    """The divergence is infinite there, so its second derivative is not a number, and not silently finite."""
    s, t = torch.zeros(1, 20, device=device), torch.zeros(1, 20, device=device)
    s[0, 3] = -torch.inf
    h = kernel(s, t, *(None,) * 5, torch.ones_like(s), torch.ones_like(s), None, None, *Options(), True, True)
    assert not h[1].isfinite().all()


EDGES = [
    edge_only_what_is_wanted,
    edge_rows_left_out_and_out_of_range,
    edge_no_rows,
    edge_a_class_only_the_other_masks,
]

"""Which form of an op a call should take.

Eager code calls the autograd Function, whose jvp, vmap and double backward are exact. Dynamo refuses
Functions with a jvp, so code being compiled calls the bare dispatcher op. Inside a torch.func
transform that is being compiled neither is right (the op's jvp would be silent zeros): there the
plain PyTorch reference is called.
"""

import enum

import torch


class Form(enum.Enum):
    FUNCTION = "function"
    OP = "op"
    REFERENCE = "reference"


def in_transform() -> bool:
    """True inside torch.func.grad, jvp, vmap, ...  The one use of this private function."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def grads_batched(grad: torch.Tensor) -> bool:
    """Whether a backward was given many cotangents at once, by autograd.grad(is_grads_batched=True) or gradcheck. Its
    vmap is not torch.func's: it sees no Function's rule, and no fallback takes an op with tensor lists through it."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)


def form() -> Form:
    if not torch.compiler.is_compiling():
        return Form.FUNCTION
    return Form.REFERENCE if in_transform() else Form.OP


def eager_apply(function: type[torch.autograd.Function]):
    """`function.apply` for eager code outside torch.func, without its two detours.

    For a Function with `setup_context` the public `apply` binds the arguments to the signature of `forward`
    at every call (23 us of a 90 us step at 128 x 10) and looks for functorch transforms; called with every
    argument given and after `in_transform()` said no, both find nothing to do.
    """
    return super(torch.autograd.Function, function).apply

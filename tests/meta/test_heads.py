"""Heads whose meta-parameters come before what has a hidden state between forward and backward: norms, softmaxes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdfast.meta import exact_hypergradient, meta_kd_step
from kdfast.methods import Distiller


def attention(x, y):
    # Fused attention is once differentiable; without a dimension of heads, as here, it was not fused before torch 2.14.
    with sdpa_kernel(SDPBackend.MATH):
        return (F.scaled_dot_product_attention(x[None], x[None], x[None]) ** 2).mean()


HEADS = {
    "batch_norm": lambda x, y: (F.batch_norm(x, None, None, training=True) ** 3).mean(),
    "layer_norm": lambda x, y: (F.layer_norm(x, (6,)) ** 3).mean(),
    "instance_norm": lambda x, y: (F.instance_norm(x.view(2, 4, 6)) ** 3).mean(),
    "group_norm": lambda x, y: (F.group_norm(x, 2) ** 3).mean(),
    "softmax": lambda x, y: (x.softmax(1) ** 2).mean(),
    "log_softmax": lambda x, y: (F.log_softmax(x, 1) ** 2).mean(),
    "logsumexp": lambda x, y: (torch.logsumexp(x, 1) ** 2).mean(),
    "cross_entropy": F.cross_entropy,
    "module": lambda x, y: F.mse_loss(nn.BatchNorm1d(6, affine=False).double()(x).sigmoid(), F.one_hot(y, 6).double()),
    "attention": attention,
}


class Scaled(Distiller):
    """A head that scales the logits by what it learns, and has an inner parameter of its own."""

    def __init__(self, function):
        super().__init__(nn.Linear(5, 6))
        self.scale, self.shift = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.randn(6))
        self.function = function

    def losses(self, outputs, teacher_outputs, targets):
        return {"head": self.function(self.scale * outputs + self.shift, targets)}

    def meta_parameters(self):
        yield self.scale


@pytest.mark.parametrize("tangent", ["forward", "jvp"])
@pytest.mark.parametrize("head", HEADS)
def test_meta_gradient_is_that_of_the_whole_step_differentiated_twice(head, tangent):
    torch.manual_seed(0)
    distiller = Scaled(HEADS[head]).double()
    train, validation = ((torch.randn(8, 5).double(), torch.randint(6, (8,))) for _ in range(2))
    optimizer = torch.optim.SGD(distiller.inner_parameters(), lr=0.1, momentum=0.9)
    (exact,) = exact_hypergradient(distiller, train, validation, optimizer)
    meta_optimizer = torch.optim.SGD(distiller.meta_parameters(), lr=0.0)
    report = meta_kd_step(distiller, train, validation, optimizer, meta_optimizer, tangent=tangent)
    assert exact.norm() > 0 and not report.skipped
    torch.testing.assert_close(distiller.scale.grad, exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
    assert report.tangent_error < 1e-5

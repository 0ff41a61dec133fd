"""A student and a head to put odd things into, and the meta-gradient by double backward without `kdfast.meta`."""

import copy

import torch
from torch import nn
from torch.optim import SGD

from kdfast.losses.kd_kl import kd_loss
from kdfast.methods import Distiller
from tests.meta.test_hypergradient import flat


class Net(nn.Module):
    """Two convolutions with BatchNorm; logits and a feature."""

    def __init__(self, middle=None, activation=None):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.middle, self.activation = middle or nn.AvgPool2d(2), activation or nn.ReLU()
        self.classifier = nn.Linear(6, 5)

    def first(self, x):
        return self.activation(self.norm1(self.conv1(x)))

    def second(self, x):
        return self.activation(self.norm2(self.conv2(x)))

    def forward(self, x):  # [batch, 3, 8, 8]
        feature = self.second(self.middle(self.first(x)))
        return self.classifier(feature.mean((2, 3))), feature


class Head(Distiller):
    """A learned temperature and a learned weight of a loss on the feature."""

    def __init__(self, student):
        super().__init__(student)
        self.phi = nn.Parameter(torch.tensor([0.3, 2.0]))

    def losses(self, outputs, teacher_outputs, targets):
        logits, feature = outputs
        wanted = torch.eye(5, dtype=logits.dtype)[targets]
        return {
            "kd": kd_loss(logits, wanted, targets, student_temperature=self.phi[1]),
            "feature": self.phi[0] * (feature.square().mean() + feature.mean()),
        }

    def logits(self, outputs):
        return outputs[0]

    def meta_parameters(self):
        yield self.phi


def batch(count=16, dtype=torch.float64):
    return torch.randn(count, 3, 8, 8, dtype=dtype), torch.randint(5, (count,))


def optimizers(distiller):
    optimizer = SGD([p for p in distiller.inner_parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    return optimizer, SGD(distiller.meta_parameters(), lr=0.0)


def plain_step(distiller, train, optimizer):
    optimizer.zero_grad()
    parts = distiller.losses(distiller.student_outputs(train[0]), None, train[1])
    sum(parts.values()).backward(inputs=[p for p in distiller.inner_parameters() if p.requires_grad])
    optimizer.step()


def reference(distiller, train, validation):
    """Double backward through the step, without anything of kdfast.meta."""
    copied = copy.deepcopy(distiller)
    inner = [p for p in copied.inner_parameters() if p.requires_grad]
    loss = sum(copied.losses(copied.student_outputs(train[0]), None, train[1]).values())
    g = torch.autograd.grad(loss, inner, create_graph=True, allow_unused=True)
    stepped = copy.deepcopy(distiller)
    values = [p for p in stepped.inner_parameters() if p.requires_grad]
    for p, x in zip(values, g, strict=True):
        p.data.sub_(0.1 * torch.zeros_like(p) if x is None else 0.1 * x.detach())
    measured = stepped.validation_loss(stepped.student_outputs(validation[0]), validation[1])
    v = torch.autograd.grad(measured, values, allow_unused=True)
    slope = sum((-0.1 * x * y).sum() for x, y in zip(g, v, strict=True) if x is not None and y is not None)
    return flat(torch.autograd.grad(slope, copied.meta_parameters()))

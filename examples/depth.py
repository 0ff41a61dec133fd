"""DistPro on depth estimation: search a process of 18 pathways between two encoder-decoders, then retrain with it.

The task loss is berHu, absolute below a threshold and squared above it, in place of cross-entropy; everything else is
as for classification. The scenes are made up: smooth depth, seen through fog and noise.

    pip install kdfast
    python examples/depth.py
"""

import torch
from torch import nn
from torch.nn import functional as F

from kdfast import Alone, DistPro, Process, meta_kd_step
from kdfast.train.loop import ordinary_step

SIDE, STEPS, SEARCH_STEPS = 32, 60, 20


def batch(count):
    """Images [count, 3, 32, 32] and depth in metres [count, 1, 32, 32]: the farther, the more of the light is fog."""
    depth = 1 + 4 * F.interpolate(torch.rand(count, 1, 5, 5), (SIDE, SIDE), mode="bicubic").clamp(0, 1)
    colour = torch.rand(count, 3, 1, 1)
    clear = (-0.4 * depth).exp()
    return colour * clear + (1 - clear) + 0.05 * torch.randn(count, 3, SIDE, SIDE), depth


class DepthNet(nn.Module):
    """Two halvings down, two doublings up. Its features are the maps of both halves, three in all."""

    def __init__(self, width):
        super().__init__()
        self.widths = (width, 2 * width, width)

        def block(i, o, stride=1):
            return nn.Sequential(nn.Conv2d(i, o, 3, stride, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

        self.down1, self.down2 = block(3, width, 2), block(width, 2 * width, 2)
        self.up, self.depth = block(3 * width, width), nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, images, features=False):
        half = self.down1(images)
        quarter = self.down2(half)
        up = self.up(torch.cat([F.interpolate(quarter, scale_factor=2.0), half], 1))
        depth = 3 + F.interpolate(self.depth(up), scale_factor=2.0, mode="bilinear")
        return (depth, [half, quarter, up]) if features else depth


def berhu(depth, target):
    """Absolute up to c, a fifth of the largest error, squared beyond (Laina et al., 2016, arXiv:1606.00373)."""
    error = (depth - target).abs()
    c = 0.2 * error.max().detach() + 1e-6
    return torch.where(error <= c, error, (error**2 + c**2) / (2 * c)).mean()


@torch.no_grad()
def rmse(network, images, depth):
    return float((network.eval()(images) - depth).square().mean().sqrt())


def sgd(distiller):
    return torch.optim.SGD(distiller.train().inner_parameters(), lr=0.02, momentum=0.9)


torch.manual_seed(0)
held_out = batch(64)
teacher = Alone(DepthNet(24), task_loss=berhu)
optimizer = sgd(teacher)
for _ in range(150):
    ordinary_step(teacher, batch(16), optimizer)

# Search: alpha learns what lowers berHu on other scenes, after the student's step.
options = {"transforms": ("conv1", "conv2"), "task_loss": berhu}
search = DistPro(DepthNet(6), teacher.export(), **options)
optimizer, meta_optimizer = sgd(search), torch.optim.Adam(search.meta_parameters(), lr=0.05)
process = Process(search.pathways)
for _ in range(SEARCH_STEPS):
    process.record(search.weights(), search.weights.raw)
    meta_kd_step(search, batch(16), batch(16), optimizer, meta_optimizer)

# Retrain: the process, stretched, gives the weights.
distiller = DistPro(DepthNet(6), teacher.export(), **options)
untrained = rmse(distiller.export(), *held_out)
distiller.follow(process.resample(STEPS))
optimizer = sgd(distiller)
for step in range(STEPS):
    distiller.start_step(step)
    ordinary_step(distiller, batch(16), optimizer)

moved = (process.weights[-1] - process.weights[0]).abs().max()
errors = rmse(teacher.export(), *held_out), rmse(distiller.export(), *held_out)
print(f"RMSE in metres: teacher {errors[0]:.2f}, student {errors[1]:.2f}, untrained {untrained:.2f}")
print(f"{len(process.pathways)} pathways; at the end of the search most weight: "
      f"{process.pathways[int(process.weights[-1].argmax())]}")  # fmt: skip

assert len(process.pathways) == 18
assert moved > 1e-3  # the search has learned something
assert errors[0] < errors[1] < 0.6 * untrained

"""Learn the weight of each loss of torchvision's RetinaNet, and of imitating a teacher, by a head of one's own.

`LearnedWeights`, ten lines, says what the meta-parameters are and how they enter the loss; `meta_kd_step` learns them
from held-out images, with any network and any losses. The images are made up: a bright square on a noisy ground.

    pip install kdfast torchvision
    python examples/learned_loss_weights.py
"""

import torch
from torch import nn

from kdfast import Distiller, meta_kd_step, pathway_loss
from kdfast._torchvision import import_module  # "import torchvision" does too, where its compiled operators load

SIDE = 64
resnet, detection = import_module("torchvision.models.resnet"), import_module("torchvision.models.detection")


def batch(count):
    """Images [count, 3, 64, 64]; and of each its box [1, 4] in pixels, and its label [1]."""
    images, targets = 0.3 * torch.randn(count, 3, SIDE, SIDE), []
    for image, (x, y) in zip(images, torch.randint(SIDE - 24, (count, 2)).tolist(), strict=True):
        image[:, y : y + 24, x : x + 24] += 1
        targets.append({"boxes": torch.tensor([[x, y, x + 24.0, y + 24.0]]), "labels": torch.tensor([0])})
    return images, targets


def retinanet(blocks):
    pyramid = detection.backbone_utils.BackboneWithFPN(
        resnet.ResNet(resnet.BasicBlock, blocks), {"layer2": "0", "layer3": "1"}, [128, 256], out_channels=32
    )
    anchors = detection.anchor_utils.AnchorGenerator(((12,), (24,), (48,)), ((1.0,),) * 3)
    return detection.RetinaNet(
        pyramid,
        num_classes=1,
        anchor_generator=anchors,
        head=detection.retinanet.RetinaNetHead(32, 1, 1, norm_layer=lambda channels: nn.GroupNorm(8, channels)),
        min_size=SIDE,
        max_size=SIDE,
    )


class Imitation(Distiller):
    """The detector's own losses, and the distance of its feature pyramid from the teacher's."""

    def student_outputs(self, images):
        images, _ = self.student.transform(list(images))
        features = list(self.student.backbone(images.tensors).values())
        return self.student.head(features), self.student.anchor_generator(images, features), features

    @torch.no_grad()
    def teacher_outputs(self, images):
        images, _ = self.teacher.transform(list(images))
        return list(self.teacher.backbone(images.tensors).values())

    def detection_losses(self, outputs, targets):
        heads, anchors, _ = outputs
        return self.student.compute_loss(targets, heads, anchors)  # "classification" and "bbox_regression"

    def losses(self, outputs, teacher_features, targets):
        imitation = pathway_loss(outputs[2], teacher_features)
        return {**self.detection_losses(outputs, targets), "imitation": imitation}

    def validation_loss(self, outputs, targets):
        return sum(self.detection_losses(outputs, targets).values())


class LearnedWeights(Imitation):
    def __init__(self, student, teacher):
        super().__init__(student, teacher)
        self.log_weights = nn.Parameter(torch.tensor([0.0, 0.0, -1.0]))

    def losses(self, outputs, teacher_features, targets):
        parts = super().losses(outputs, teacher_features, targets)
        return {name: w * part for w, (name, part) in zip(self.log_weights.exp(), parts.items(), strict=True)}

    def meta_parameters(self):
        yield self.log_weights


torch.manual_seed(0)
teacher = retinanet([2, 2, 2, 1])
optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
for _ in range(30):
    optimizer.zero_grad()
    images, targets = batch(4)
    sum(teacher(list(images), targets).values()).backward()
    optimizer.step()

distiller = LearnedWeights(retinanet([1, 1, 1, 1]), teacher).train()
optimizer = torch.optim.AdamW(distiller.inner_parameters(), lr=2e-3)
meta_optimizer = torch.optim.Adam(distiller.meta_parameters(), lr=0.03)
start = distiller.log_weights.exp().tolist()
reports = [meta_kd_step(distiller, batch(4), batch(4), optimizer, meta_optimizer) for _ in range(30)]
end = distiller.log_weights.exp().tolist()

held_out = [float(report.validation_loss) for report in reports]
first, last = sum(held_out[:5]) / 5, sum(held_out[-5:]) / 5
print(f"loss of held-out images: {first:.2f} -> {last:.2f}")
for name, a, b in zip(("classification", "box", "imitation"), start, end, strict=True):
    print(f"weight of {name}: {a:.2f} -> {b:.2f}")

assert last < 0.7 * first
assert all(abs(a - b) > 0.02 for a, b in zip(start, end, strict=True))

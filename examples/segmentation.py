"""Distil torchvision's FCN on a ResNet-18 into its LR-ASPP on a MobileNetV3: pixel logits and one feature map.

Every pixel is a row to `kd_loss`; pixels without a label (255, as in VOC) count for nothing, distillation included. The
images are made up: a red square and a blue disc on a noisy ground.

    pip install kdfast torchvision
    python examples/segmentation.py
"""

import torch
from torch import nn
from torch.nn import functional as F

from kdfast import Distiller, kd_loss, pathway_loss
from kdfast._torchvision import import_module  # "import torchvision" does too, where its compiled operators load
from kdfast.train.loop import ordinary_step

SIDE, CLASSES, UNLABELLED = 48, 3, 255


def batch(count):
    """Images [count, 3, 48, 48] and the class of each pixel [count, 48, 48], those at the border unlabelled."""
    images, labels = 0.5 * torch.randn(count, 3, SIDE, SIDE), torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for image, label in zip(images, labels, strict=True):
        (top, left), (above, before) = torch.randint(8, SIDE - 16, (2, 2))
        label[top : top + 14, left : left + 14] = 1
        label[(y - above - 8) ** 2 + (x - before - 8) ** 2 < 64] = 2
        image[0] += label == 1
        image[2] += label == 2
    labels[:, [0, -1]] = UNLABELLED
    labels[:, :, [0, -1]] = UNLABELLED
    return images, labels


def run(network, images):
    """Logits of each pixel [batch, classes, height, width], and the low-level feature map."""
    features = network.backbone(images)
    logits = network.classifier(features.get("out", features))
    return F.interpolate(logits, images.shape[2:], mode="bilinear"), features["low"]


class SegmentationKD(Distiller):
    def __init__(self, student, teacher, student_channels, teacher_channels):
        super().__init__(student, teacher)
        self.adapter = nn.Conv2d(student_channels, teacher_channels, 1)

    def student_outputs(self, images):
        return run(self.student, images)

    @torch.no_grad()
    def teacher_outputs(self, images):
        return run(self.teacher, images)

    def losses(self, outputs, teacher_outputs, labels):
        (logits, feature), (teacher_logits, teacher_feature) = outputs, teacher_outputs
        rows = [x.movedim(1, -1) for x in (logits, teacher_logits)]  # [batch, height, width, classes]
        return {
            "pixels": kd_loss(*rows, labels, ignore_index=UNLABELLED, reduction="mean"),
            "feature": pathway_loss([self.adapter(feature)], [teacher_feature], [0.1], resize="bilinear"),
        }


@torch.no_grad()
def mean_iou(network, images, labels):
    """Intersection over union, averaged over the classes, in [0, 1]."""
    guess = network.eval()(images)["out"].argmax(1)[labels != UNLABELLED]
    labels = labels[labels != UNLABELLED]
    both = [(guess == c) & (labels == c) for c in range(CLASSES)]
    either = [(guess == c) | (labels == c) for c in range(CLASSES)]
    return sum(float(a.sum() / b.sum()) for a, b in zip(both, either, strict=True)) / CLASSES


torch.manual_seed(0)
models, segmentation = import_module("torchvision.models"), import_module("torchvision.models.segmentation")
body = import_module("torchvision.models._utils").IntermediateLayerGetter(
    models.resnet18(), {"layer1": "low", "layer2": "out"}
)
teacher = segmentation.FCN(body, segmentation.fcn.FCNHead(128, CLASSES))
optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-3)
for _ in range(40):
    images, labels = batch(8)
    optimizer.zero_grad()
    F.cross_entropy(teacher(images)["out"], labels, ignore_index=UNLABELLED).backward()
    optimizer.step()

student = segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=CLASSES)
for module in student.modules():
    if isinstance(module, nn.BatchNorm2d):
        module.momentum = 0.1  # torchvision's 0.01 takes hundreds of steps to see the data
distiller = SegmentationKD(student, teacher, student_channels=40, teacher_channels=64).train()
optimizer = torch.optim.AdamW(distiller.inner_parameters(), lr=3e-3)
losses = [float(ordinary_step(distiller, batch(8), optimizer)) for _ in range(50)]

held_out = batch(16)
scores = mean_iou(teacher, *held_out), mean_iou(distiller.export(), *held_out)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; mean IoU: teacher {scores[0]:.2f}, student {scores[1]:.2f}")

assert losses[-1] < 0.5 * losses[0]
assert scores[1] > 0.5  # ground alone: 0.3

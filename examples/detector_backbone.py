"""Distil the backbone of torchvision's RetinaNet stage by stage, then train the detector on its boxes.

Stages of the student's ResNet learn the teacher's feature maps one after another; then the feature pyramid and the
heads learn the detector's own losses, the backbone standing still. No loss weight is chosen. The images are made up: a
red and a blue square on a noisy ground.

    pip install kdfast torchvision
    python examples/detector_backbone.py

Source: Gao et al., 2018 (arXiv:1812.01819), tables 8 and 9.
"""

import torch
from torch import nn

from kdfast import StageByStage
from kdfast._torchvision import import_module  # "import torchvision" does too, where its compiled operators load
from kdfast.train.loop import ordinary_step

SIDE = 64
resnet, detection = import_module("torchvision.models.resnet"), import_module("torchvision.models.detection")


def batch(count):
    """Images of [3, 64, 64], and of each its boxes [2, 4] in pixels and their labels [2]."""
    images, targets = 0.3 * torch.randn(count, 3, SIDE, SIDE), []
    for image in images:
        corners, sizes = torch.randint(SIDE - 24, (2, 2)), torch.randint(12, 24, (2, 1))
        for colour, ((y, x), (size,)) in zip((0, 2), zip(corners, sizes, strict=True), strict=True):
            image[colour, y : y + size, x : x + size] += 1
        boxes = torch.cat([corners.flip(1), corners.flip(1) + sizes], 1).float()
        targets.append({"boxes": boxes, "labels": torch.tensor([0, 1])})
    return list(images), targets


def retinanet(blocks):
    body = resnet.ResNet(resnet.BasicBlock, blocks)
    pyramid = detection.backbone_utils.BackboneWithFPN(
        body, {"layer2": "0", "layer3": "1", "layer4": "2"}, [128, 256, 512], out_channels=64
    )
    anchors = detection.anchor_utils.AnchorGenerator(((8, 16), (16, 32), (32, 64), (64, 96)), ((1.0,),) * 4)
    head = detection.retinanet.RetinaNetHead(64, 2, 2, norm_layer=lambda channels: nn.GroupNorm(8, channels))
    return detection.RetinaNet(pyramid, 2, anchor_generator=anchors, head=head, min_size=SIDE, max_size=SIDE)


def stages(detector):
    """The four stages of a detector's ResNet, the stem in the first: the same modules, no copies."""
    modules = dict(detector.backbone.body.items())
    stem = [modules[name] for name in ("conv1", "bn1", "relu", "maxpool", "layer1")]
    return [nn.Sequential(*stem), *(modules[name] for name in ("layer2", "layer3", "layer4"))]


def train(detector, steps):
    """Whatever of it may learn, on its own losses; returns their sum on held-out images."""
    body = detector.train().backbone.body
    body.train(next(body.parameters()).requires_grad)  # what is frozen keeps its BatchNorm statistics
    optimizer = torch.optim.AdamW([p for p in detector.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(detector(*batch(4)).values()).backward()
        optimizer.step()
    body.eval()
    with torch.no_grad():  # in train mode a detector returns its losses
        return float(sum(detector(*held_out).values()))


torch.manual_seed(0)
held_out = batch(32)
teacher = retinanet([2, 2, 2, 2])
teacher_loss = train(teacher, 45)

torch.manual_seed(1)
student = retinanet([1, 1, 1, 1])
networks = [nn.Sequential(*stages(detector)) for detector in (student, teacher)]
mimic = StageByStage(*networks, student_parts=(networks[0], nn.Identity()), teacher_parts=(networks[1], nn.Identity()))
optimizer = torch.optim.AdamW(mimic.inner_parameters(), lr=1e-3)
for stage in range(len(networks[0])):
    mimic.set_stage(stage)
    mimic.train()
    distances = []
    for _ in range(30):
        images = teacher.transform(batch(8)[0])[0].tensors  # normalised as the detector's own
        distances.append(float(ordinary_step(mimic, (images, None), optimizer)))
    print(f"stage {stage + 1}: distance to the teacher's features {distances[0]:.3f} -> {distances[-1]:.3f}")
    assert distances[-1] < 0.8 * distances[0]
mimic.set_stage(len(networks[0]))  # the backbone stands still from here on
student_loss = train(student, 40)

torch.manual_seed(1)
untaught = retinanet([1, 1, 1, 1])
untaught.backbone.body.requires_grad_(False)
untaught_loss = train(untaught, 40)
print(f"held-out loss: teacher {teacher_loss:.2f}, student {student_loss:.2f}, on random stages {untaught_loss:.2f}")

assert student_loss < 0.95 * untaught_loss

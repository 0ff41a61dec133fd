"""Distil a convolutional network into timm's DeiT with a distillation token, and learn both temperatures (MKD).

The class token learns the labels, the distillation token the teacher; the network's answer is the mean of both.

    pip install kdfast[digits] timm
    python examples/vit_token.py
"""

import torch

from kdfast import MKD, Alone
from kdfast._torchvision import import_module  # "import timm" does too, where torchvision's compiled operators load
from kdfast.data import TensorLoader, load_digits
from kdfast.models import CifarResNet
from kdfast.train.loop import accuracy, warmup_cosine
from kdfast.train.trainer import Trainer

EPOCHS = 24

torch.manual_seed(0)
torch.set_num_threads(1)  # for networks this small a second thread costs more than it brings
digits = load_digits(train_per_class=100)
kept, held_out = digits.train.split(0.2, seed=0)

teacher = CifarResNet(8, widths=(16, 32, 64), in_channels=1)
batches = TensorLoader(kept, 64, seed=0, shift=1, background=digits.background)
optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.02, weight_decay=0.1)
schedule = warmup_cosine(optimizer, EPOCHS * len(batches), warmup=0.1)
Trainer(Alone(teacher), batches, optimizer, epochs=EPOCHS, scheduler=schedule).run()

student = import_module("timm").create_model(
    "deit_tiny_distilled_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=10,
    embed_dim=48, depth=2, num_heads=3,
)  # fmt: skip
student.set_distilled_training(True)  # in training it then returns (class logits, distillation logits)
distiller = MKD(student, teacher, distillation_token=True, span=2.0, meta_last_epochs=EPOCHS // 3)  # the paper's share
batches = TensorLoader(kept, 64, seed=0)
optimizer = torch.optim.AdamW(distiller.inner_parameters(), lr=4e-3, weight_decay=0.05)
Trainer(
    distiller,
    batches,
    optimizer,
    epochs=EPOCHS,
    scheduler=warmup_cosine(optimizer, EPOCHS * len(batches), warmup=0.1),
    validation_batches=TensorLoader(held_out, 64, seed=0),
    meta_optimizer=torch.optim.AdamW(distiller.meta_parameters(), lr=3e-3),
).run()

tau_s, tau_t = (tau.item() for tau in distiller.temperatures())
scores = accuracy(Alone(teacher), *digits.test), accuracy(distiller, *digits.test)
print(f"temperatures: student {tau_s:.2f}, teacher {tau_t:.2f}, both 3 at the start")
print(f"test images right: teacher {scores[0]:.1%}, student {scores[1]:.1%}")

assert tau_s != 3.0 != tau_t
assert scores[1] > 0.75

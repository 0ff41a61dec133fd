"""Distil a small network into a smaller one on real digits, and learn both temperatures on the way (MKD).

The student imitates the teacher's softened probabilities and never sees a label of its own. The temperatures do:
each step they move to where the student's step lowers its loss on held-out images.

    pip install kdfast[digits]
    python examples/learned_temperatures.py
"""

import torch

from kdfast import MKD, Alone, meta_kd_step
from kdfast.data import TensorLoader, load_digits
from kdfast.models import CifarResNet
from kdfast.train.loop import accuracy, warmup_cosine
from kdfast.train.trainer import Trainer

EPOCHS = 150  # of two batches: 100 training images are few

torch.manual_seed(0)
torch.set_num_threads(1)  # for networks this small a second thread costs more than it brings
digits = load_digits(train_per_class=10)

# A teacher, trained on the labels.
teacher = CifarResNet(8, widths=(16, 32, 64), in_channels=1)
batches = TensorLoader(digits.train, 50, seed=0, shift=1, background=digits.background)
optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.04, weight_decay=0.1)
schedule = warmup_cosine(optimizer, EPOCHS * len(batches), warmup=0.1)
Trainer(Alone(teacher), batches, optimizer, epochs=EPOCHS, scheduler=schedule).run()
teacher_accuracy = accuracy(Alone(teacher), *digits.test)

# A student of a seventh of its size, and the two temperatures between them.
student = CifarResNet(8, widths=(8, 16, 16), in_channels=1)
distiller = MKD(student, teacher, initial_temperature=4.0, span=2.0)
kept, held_out = digits.train.split(0.1, seed=0)
batches = TensorLoader(kept, 50, seed=0, batches=2)
validation = TensorLoader(held_out, 10, seed=0, batches=2)
optimizer = torch.optim.AdamW(distiller.inner_parameters(), lr=0.04, weight_decay=0.01)
meta_optimizer = torch.optim.AdamW(distiller.meta_parameters(), lr=3e-3)
schedule = warmup_cosine(optimizer, EPOCHS * len(batches), warmup=0.1)

for epoch in range(EPOCHS):
    for train_batch, validation_batch in zip(batches, validation, strict=True):
        report = meta_kd_step(distiller, train_batch, validation_batch, optimizer, meta_optimizer)
        schedule.step()
    if epoch % 30 == 29:
        tau_s, tau_t = distiller.temperatures()
        print(
            f"epoch {epoch + 1:3d}: loss {report.loss:.3f}, validation loss {report.validation_loss:.3f}, "
            f"student temperature {tau_s:.2f}, teacher temperature {tau_t:.2f}"
        )

student_accuracy = accuracy(distiller, *digits.test)
sizes = [sum(p.numel() for p in network.parameters()) for network in (teacher, distiller.export())]
print(f"teacher: {sizes[0]:,} parameters, {teacher_accuracy:.1%} of {len(digits.test.labels)} test images right")
print(f"student: {sizes[1]:,} parameters, {student_accuracy:.1%}")

assert sizes[0] > 7 * sizes[1]
assert all(3.0 < tau < 5.0 and tau != 4.0 for tau in distiller.temperatures())  # learned, within their range
assert student_accuracy > 0.85

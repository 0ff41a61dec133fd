"""The step of benchmarks/test_meta_step.py as others take it: the papers' in plain eager PyTorch, and by the peers.

All have one network, one head and one state; the head here is written without kdfast's ops, as a user without kdfast
would, and can be differentiated twice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.losses.kd_kl import kd_loss
from kdfast.methods import DistPro, Temperatures

LR, MOMENTUM, RADIUS = 0.05, 0.9, 0.01


class PathwaysAndTemperatures(DistPro):
    """DistPro's 27 pathways beside MKD's temperatures, both learned."""

    def __init__(self, student: nn.Module, teacher: nn.Module):
        super().__init__(student, teacher)
        self.temperatures = Temperatures(mlp=False)

    def losses(self, outputs, teacher_outputs, targets):
        parts = super().losses(outputs, teacher_outputs, targets)
        tau_s, tau_t = self.temperatures()
        kd = kd_loss(
            outputs[0], teacher_outputs[0], student_temperature=tau_s, teacher_temperature=tau_t, divergence="soft_ce",
            scale="none",
        )  # fmt: skip
        return {**parts, "kd": kd}

    def meta_parameters(self):
        yield from self.weights.parameters()
        yield from self.temperatures.parameters()

    def inner_parameters(self):
        learned = {id(p) for p in self.meta_parameters()}
        return (p for p in self.parameters() if id(p) not in learned)


def distance(a: Tensor, b: Tensor) -> Tensor:  # of [batch, channels, height, width]
    """The hierarchical context loss as ReviewKD's published code takes it."""
    height, total, loss = a.shape[2], 1.0, F.mse_loss(a, b)
    weight = 1.0
    for size in (4, 2, 1):
        if size >= height:
            continue
        weight /= 2
        loss = loss + weight * F.mse_loss(F.adaptive_avg_pool2d(a, size), F.adaptive_avg_pool2d(b, size))
        total += weight
    return loss / total


def head(d: PathwaysAndTemperatures, outputs, teacher_outputs, targets) -> Tensor:
    logits, features = outputs
    students, teachers = d._ends_met(features, teacher_outputs[1], range(len(d.pathways)))
    distances = torch.stack([distance(a, b) for a, b in zip(students, teachers, strict=True)])
    tau_s, tau_t = d.temperatures()
    soft = (teacher_outputs[0] / tau_t).softmax(1)
    kd = -(soft * (logits / tau_s).log_softmax(1)).sum(1).mean()
    return F.cross_entropy(logits, targets) + (d.weights() * distances).sum() + kd


class Paper:
    """Virtual step, validation, two displaced passes, phi, the step anew: 5 forwards, 3 backwards of the student."""

    def __init__(self, d, optimizer, meta_optimizer):
        self.d, self.optimizer, self.meta_optimizer = d, optimizer, meta_optimizer
        self.theta, self.phi = list(d.student.parameters()), list(d.meta_parameters())

    def step(self, train, validation, taught) -> None:
        d, theta, phi, (x, y) = self.d, self.theta, self.phi, train
        at = [p.detach().clone() for p in theta]
        g = torch.autograd.grad(head(d, d.student_outputs(x), taught, y), theta)
        with torch.no_grad():
            for p, gradient in zip(theta, g, strict=True):
                buffer = self.optimizer.state[p].get("momentum_buffer")
                p.sub_(LR * (gradient if buffer is None else MOMENTUM * buffer + gradient))
        v = torch.autograd.grad(d.validation_loss(d.student_outputs(validation[0]), validation[1]), theta)
        epsilon = RADIUS / torch.cat([x.flatten() for x in v]).norm()
        gradients = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, t, direction in zip(theta, at, v, strict=True):
                    p.copy_(t + sign * epsilon * direction)
                outputs = d.student_outputs(x)
            with frozen(d.transforms):
                gradients.append(torch.autograd.grad(head(d, outputs, taught, y), phi))
        for p, ahead, behind in zip(phi, *gradients, strict=True):
            p.grad = -LR * (ahead - behind) / (2 * epsilon)
        self.meta_optimizer.step()
        with torch.no_grad():
            for p, t in zip(theta, at, strict=True):
                p.copy_(t)
        self.optimizer.zero_grad(set_to_none=True)
        head(d, d.student_outputs(x), taught, y).backward(inputs=[*theta, *d.transforms.parameters()])
        self.optimizer.step()


class frozen:
    """No gradient in a module's parameters meanwhile."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __enter__(self):
        self.module.requires_grad_(False)

    def __exit__(self, *_):
        self.module.requires_grad_(True)


def higher_step(d, optimizer, meta_optimizer, train, validation, taught) -> None:
    """By facebookresearch/higher: exact, double backward through the unrolled step; then the step anew."""
    import higher

    of_student = torch.optim.SGD(d.student.parameters(), lr=LR, momentum=MOMENTUM)
    for p in d.student.parameters():
        of_student.state[p] = dict(optimizer.state[p])
    with higher.innerloop_ctx(d.student, of_student, copy_initial_weights=True) as (network, inner):
        inner.step(head(d, network(train[0], features=True), taught, train[1]))
        loss = d.validation_loss(network(validation[0], features=True), validation[1])
        for p, h in zip(d.meta_parameters(), torch.autograd.grad(loss, list(d.meta_parameters())), strict=True):
            p.grad = h
    anew(d, optimizer, meta_optimizer, train, taught)


def torchopt_step(d, optimizer, meta_optimizer, train, validation, taught) -> None:
    """By metaopt/torchopt's MetaSGD: double backward through the unrolled step, exact but for the momentum, which
    begins at zero; then the step anew."""
    import torchopt

    inner = torchopt.MetaSGD(d.student, lr=LR)
    before = torchopt.extract_state_dict(d.student, by="reference")
    inner.step(head(d, d.student_outputs(train[0]), taught, train[1]))
    loss = d.validation_loss(d.student_outputs(validation[0]), validation[1])
    for p, h in zip(d.meta_parameters(), torch.autograd.grad(loss, list(d.meta_parameters())), strict=True):
        p.grad = h
    torchopt.recover_state_dict(d.student, before)
    anew(d, optimizer, meta_optimizer, train, taught)


def anew(d, optimizer, meta_optimizer, train, taught) -> None:
    """phi's step, then the student's with the new phi."""
    meta_optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    inputs = [p for group in optimizer.param_groups for p in group["params"]]
    head(d, d.student_outputs(train[0]), taught, train[1]).backward(inputs=inputs)
    optimizer.step()


class Betty:
    """By leopard-ai/betty's engine: central difference, the student's step being the unrolled one."""

    def __init__(self, d, optimizer, meta_optimizer, train, validation, taught):
        from betty.configs import Config, EngineConfig
        from betty.engine import Engine
        from betty.problems import ImplicitProblem

        class Phi(nn.Module):
            def __init__(self):
                super().__init__()
                self.values = nn.ParameterList(d.meta_parameters())

            def forward(self):
                return list(self.values)

        class Outer(ImplicitProblem):
            def training_step(self, batch):
                x, y = batch
                return d.validation_loss(self.inner.module(x, features=True), y)

        class Inner(ImplicitProblem):
            def training_step(self, batch):
                x, y = batch
                return head(d, self.module(x, features=True), taught, y)

        outer = Outer(
            name="outer", module=Phi(), optimizer=meta_optimizer, train_data_loader=[validation],
            config=Config(type="darts", darts_alpha=RADIUS, retain_graph=True),
        )  # fmt: skip
        inner = Inner(
            name="inner", module=d.student, optimizer=optimizer, train_data_loader=[train],
            config=Config(type="darts", unroll_steps=1),
        )  # fmt: skip
        self.engine = Engine(
            config=EngineConfig(train_iters=1, valid_step=10**9, logger_type="none"), problems=[outer, inner],
            dependencies={"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
        )  # fmt: skip

    def step(self) -> None:
        self.engine.train_step()

"""What a comparison is made of: its numbers, its trainings, what came of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kdfast.meta import Process

TITLES = {  # of what is compared, by its name on the command line
    "alone": "student alone",
    "kd": "KD",
    "at": "AT",
    "reviewkd": "ReviewKD",
    "mkd": "MKD",
    "distpro": "DistPro",
    "metadistiller": "MetaDistiller",
    "self_guidance": "Self-Guidance",
    "stagewise": "stage by stage",
}


@dataclass(frozen=True)
class Recipe:
    """Every number of a comparison. docs/demo.md says how the defaults were chosen: on the validation images."""

    train_per_class: int = 10
    validation_per_class: int = 60
    batch_size: int = 50
    lr: float = 0.04  # of AdamW
    weight_decay: float = 0.01  # of the students
    warmup: float = 0.1  # share of the steps in which the learning rate rises; then it falls to 0 along a cosine
    teacher_depth: int = 8
    teacher_widths: tuple[int, int, int] = (16, 32, 64)
    teacher_epochs: int = 150
    teacher_weight_decay: float = 0.1
    teacher_shift: int = 1  # the teacher's images move by up to this many pixels; the students' stay
    student_depth: int = 8
    student_widths: tuple[int, int, int] = (8, 16, 16)
    epochs: int = 150
    kd_alpha: float = 0.1
    kd_temperature: float = 4.0
    at_weight: float = 100.0
    reviewkd_weight: float = 5.0
    mkd_initial_temperature: float = 4.0
    mkd_span: float = 2.0
    mkd_lr: float = 3e-3  # of AdamW
    mkd_held_out: float = 0.1  # share of the training images on which the temperatures are learned
    distpro_scale: float = 5.0
    distpro_clip: float = 0.5
    distpro_lr: float = 0.05  # of Adam
    distpro_held_out: float = 0.2  # share of the training images on which the weights are learned, in the search
    distpro_search_epochs: int = 38
    metadistiller_alpha: float = 0.7
    metadistiller_temperature: float = 1.0
    metadistiller_every: int = 5  # epochs
    metadistiller_lr: float = 0.1  # of Adam
    metadistiller_exit: str = "linear"
    self_guidance_strength: float = 0.25
    self_guidance_temperature: float = 3.0
    self_guidance_survival: float = 0.5
    evaluate_every: int = 5  # epochs

    @property
    def epoch_steps(self) -> int:
        """Steps an epoch, of every training: one pass over all training images."""
        return max(10 * self.train_per_class // self.batch_size, 1)

    def scaled(self, epochs: int) -> "Recipe":
        """The same recipe with the students trained for `epochs`, teacher and search in proportion."""
        return replace(
            self,
            epochs=epochs,
            teacher_epochs=max(round(self.teacher_epochs * epochs / self.epochs), 1),
            distpro_search_epochs=max(round(self.distpro_search_epochs * epochs / self.epochs), 1),
        )

    def planned_steps(self, methods: Sequence[str], seeds: int) -> int:
        """How many training steps `compare` will take, for a progress bar."""
        students = len(methods) * self.epochs + ("distpro" in methods) * self.distpro_search_epochs
        return self.epoch_steps * (self.teacher_epochs + seeds * students)

    def options(self, method: str) -> dict[str, Any]:
        """What the class of a method is made with, beside the networks."""
        return {
            "alone": {},
            "kd": {"alpha": self.kd_alpha, "temperature": self.kd_temperature},
            "at": {"weight": self.at_weight},
            "reviewkd": {"weight": self.reviewkd_weight},
            "mkd": {"initial_temperature": self.mkd_initial_temperature, "span": self.mkd_span},
            "distpro": {"scale": self.distpro_scale, "clip": self.distpro_clip},
            "metadistiller": {
                "alpha": self.metadistiller_alpha,
                "temperature": self.metadistiller_temperature,
                "meta_every_epochs": self.metadistiller_every,
                "exit": self.metadistiller_exit,
            },
            "self_guidance": {
                "strength": self.self_guidance_strength,
                "temperature": self.self_guidance_temperature,
                "last_survival": self.self_guidance_survival,
            },
            # Phases of equal length, whose learning rates the comparison's schedule gives: no plateau ends one.
            "stagewise": {"schedule": "plateau", "patience": self.epochs},
        }[method]


@dataclass(frozen=True)
class Run:
    """One training of one network.

    Attributes:
        steps: how many it took.
        step_ms: the median duration of a step.
        seconds: of all steps together, without data and evaluation.
        accuracy: (steps done, share of the evaluation images that are right) at each evaluation.
        temperatures: (tau_s, tau_t) after each step, of the methods that have them.
        process: the pathway weights in each step, of DistPro.
        search: the training in which DistPro found them, which is not evaluated.
    """

    steps: int
    step_ms: float
    seconds: float
    accuracy: list[tuple[int, float]]
    temperatures: list[tuple[float, float]] = field(default_factory=list)
    process: Process | None = None
    search: "Run | None" = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` did.

    Attributes:
        data, evaluated_on: name of the data set, and of the part of it on which the accuracies are.
        images: number of images in each part.
        parameters: number of parameters of "teacher" and "student".
        runs: by method, one a seed.
    """

    recipe: Recipe
    data: str
    evaluated_on: str
    images: dict[str, int]
    seeds: tuple[int, ...]
    teacher: Run
    parameters: dict[str, int]
    runs: dict[str, list[Run]]

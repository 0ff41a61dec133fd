"""The schedules of the papers, by name; what a paper leaves open is kdfast's choice and said so."""

import difflib
import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from kdfast.meta import MetaKD
from kdfast.methods import METHODS

OPTIMIZERS, SCHEDULES, META_OPTIMIZERS = ("sgd", "adamw"), ("steps", "cosine", "constant"), ("adam", "adamw")
KEPT = ("method", "options", "source")  # fields of a recipe that are not changed one by one
# Options of methods that are functions, modules or tensors, or given by the training.
NOT_WRITTEN = (
    "task_loss", "validation_loss", "extra_losses", "student_parts", "teacher_parts", "example", "labels",
)  # fmt: skip


def _check(name: str, value: Any, right: bool, expected: str) -> None:
    if not right:
        raise ValueError(f"{name} must be {expected}, got {value!r}.")


def _check_like(name: str, value: Any, default: Any) -> None:
    if isinstance(default, bool):
        _check(name, value, isinstance(value, bool), "True or False")
    elif _number(default):
        _check(name, value, _number(value), "a number")


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _listed(words: Sequence[Any]) -> str:
    return "one of " + ", ".join(map(str, words))


@dataclass(frozen=True)
class Recipe:
    """Every number of a training that is not the data's or the networks'.

    Attributes:
        method: command-line name of the method.
        epochs, batch_size: of the student; images a batch, of each process.
        optimizer: "sgd" or "adamw".
        lr, momentum, nesterov, weight_decay: of it; momentum and nesterov of SGD alone.
        schedule: of the learning rate: "steps" (x0.1 at each of `milestones`, in epochs), "cosine" (to `end` of the
            first), "constant".
        warmup: epochs in which it rises in a line, before a cosine.
        augment: of the training images, see `kdfast.data.loaders`.
        held_out: share of the training images that only meta-parameters learn on; without such, that are measured.
        halves: whether each epoch of meta-steps draws fresh random halves of the training images.
        meta_optimizer, meta_lr, meta_betas, meta_weight_decay: "adam" or "adamw" of the meta-parameters; None where
            nothing is learned.
        meta: options of `kdfast.MetaKD`, such as {"every": 5}.
        options: of the method's class.
        source: where the numbers are from, and which are kdfast's own.

    Raises:
        ValueError: for a value that a training could not use; one sentence.
    """

    method: str
    epochs: int = 240
    batch_size: int = 64
    optimizer: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: str = "steps"
    milestones: tuple[int, ...] = ()
    end: float = 0.0
    warmup: int = 0
    augment: str = "crop_flip"
    held_out: float = 0.0
    halves: bool = False
    meta_optimizer: str | None = None
    meta_lr: float = 0.0
    meta_betas: tuple[float, float] = (0.9, 0.999)
    meta_weight_decay: float = 0.0
    meta: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    source: str = "kdfast's own"

    def __post_init__(self):
        for name, allowed in (
            ("method", tuple(METHODS)), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES),
            ("meta_optimizer", (None, *META_OPTIMIZERS)),
        ):  # fmt: skip
            _check(name, getattr(self, name), getattr(self, name) in allowed, _listed(allowed))
        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            _check(name, value, _whole(value) and value >= 1, "a whole number of at least 1")
        for name in ("lr", "meta_lr", "weight_decay", "meta_weight_decay", "warmup"):
            value = getattr(self, name)
            _check(name, value, _number(value) and value >= 0, "a number of at least 0")
        for name in ("momentum", "held_out"):
            value = getattr(self, name)
            _check(name, value, _number(value) and 0 <= value < 1, "a number in [0, 1)")
        _check("end", self.end, _number(self.end) and 0 <= self.end <= 1, "a number in [0, 1]")
        for name in ("nesterov", "halves"):
            value = getattr(self, name)
            _check(name, value, isinstance(value, bool), "True or False")
        _check("augment", self.augment, isinstance(self.augment, str), "a word such as none or crop_flip")
        rising = isinstance(self.milestones, tuple) and all(_whole(at) and at >= 0 for at in self.milestones)
        _check("milestones", self.milestones, rising, "epochs such as (150, 180, 210)")
        betas = isinstance(self.meta_betas, tuple) and len(self.meta_betas) == 2
        betas = betas and all(_number(beta) and 0 <= beta < 1 for beta in self.meta_betas)
        _check("meta_betas", self.meta_betas, betas, "two numbers in [0, 1) such as (0.9, 0.999)")
        for name in ("meta", "options"):
            value = getattr(self, name)
            _check(name, value, isinstance(value, dict), 'a dictionary such as {"every": 5}')
        known = inspect.signature(MetaKD).parameters
        for name, value in self.meta.items():
            allowed = [option for option, it in known.items() if it.kind is it.KEYWORD_ONLY and option != "scaler"]
            _check("meta", self.meta, name in allowed, f"options of kdfast.MetaKD ({', '.join(allowed)})")
            _check_like(f"meta's {name}", value, known[name].default)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0, got 0; set nesterov=False.")
        if self.schedule == "cosine" and self.warmup >= self.epochs:
            raise ValueError(f"warmup must be less than the {self.epochs} epochs, got {self.warmup}.")

    def scaled(self, epochs: int) -> "Recipe":
        """The same recipe in `epochs`, its milestones and warm-up in proportion."""
        share = epochs / self.epochs
        return replace(
            self,
            epochs=epochs,
            # not before the first epoch's end: a short trial would begin at a rate that is none of the recipe's
            milestones=tuple(max(round(milestone * share), 1) for milestone in self.milestones),
            warmup=round(self.warmup * share),
        )

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Recipe":
        """From what `dataclasses.asdict` made, and JSON of it.

        Raises:
            TypeError, KeyError: for values of another version's.
            ValueError: for a value that a training could not use.
        """
        pairs = {name: tuple(values[name]) for name in ("milestones", "meta_betas")}
        return cls(**{**values, **pairs})


_REVIEW = {"epochs": 240, "batch_size": 128, "lr": 0.1, "nesterov": True, "milestones": (150, 180, 210)}

RECIPES: dict[str, Recipe] = {
    "kd-cifar100": Recipe(
        "kd",
        milestones=(150, 180, 210),
        options={"alpha": 0.1, "temperature": 4.0},
        source="Tian et al., Contrastive Representation Distillation, ICLR 2020, and its released code",
    ),
    "alone-cifar100": Recipe(
        "alone",
        milestones=(150, 180, 210),
        source="Tian et al., Contrastive Representation Distillation, ICLR 2020, and its released code",
    ),
    "distpro-cifar100-search": Recipe(
        "distpro",
        **{**_REVIEW, "epochs": 40, "milestones": (10, 20, 30)},
        held_out=0.2,
        meta_optimizer="adam",
        meta_lr=0.05,
        meta_betas=(0.5, 0.999),
        source="Deng et al., DistPro, ECCV 2022; Adam and its betas are the released code's; of ShuffleNets lr is 0.02",
    ),
    "distpro-cifar100": Recipe(
        "distpro",
        **_REVIEW,
        source="Deng et al., DistPro, ECCV 2022 (retraining: give the searched --process)",
    ),
    "mkd-cifar100": Recipe(
        "mkd",
        epochs=300,
        lr=0.05,
        schedule="cosine",
        end=0.01,
        held_out=0.1,
        meta_optimizer="adamw",
        meta_lr=3e-4,
        meta_weight_decay=5e-4,
        source="Liu et al., Meta Knowledge Distillation, 2022; the paper names no initial temperature, and as the meta "
        "weight decay 5e-5 too; momentum is kdfast's",
    ),
    "metadistiller-cifar100": Recipe(
        "metadistiller",
        epochs=200,
        batch_size=128,
        lr=0.1,
        milestones=(80, 140),
        halves=True,
        meta_optimizer="adam",
        meta_lr=0.1,
        source="Liu et al., MetaDistiller, ECCV 2020; batch size, momentum and weight decay are kdfast's",
    ),
    "self-guidance-cifar100": Recipe(
        "self_guidance",
        epochs=300,
        batch_size=128,
        lr=0.1,
        nesterov=True,
        weight_decay=1e-4,
        milestones=(150, 225),
        source="Zheng and Peng, Self-Guidance, WACV 2022",
    ),
    "stagewise-cifar100": Recipe(
        "stagewise",
        epochs=240,
        batch_size=128,
        lr=0.01,
        schedule="constant",  # StageByStage's own factor lowers it in each phase
        source="Gao et al., stage-by-stage knowledge distillation, 2018: learning rate, and drops at its ImageNet "
        "schedule's shares 18/60, 36/60, 54/60 of each phase; epochs, batch size and weight decay are kdfast's",
    ),
}


def default_recipe(method: str, follows: bool = False) -> Recipe:
    """The recipe of a method's paper; of one without, that of CRD's benchmark with the class's own options.

    Args:
        follows: whether a stored process is followed, rather than searched for.
    """
    if follows and method == "distpro":
        return RECIPES["distpro-cifar100"]
    of_method = [recipe for recipe in RECIPES.values() if recipe.method == method]
    return of_method[0] if of_method else replace(RECIPES["alone-cifar100"], method=method)


def options_of(method: str) -> dict[str, inspect.Parameter]:
    """The options of a method's class that can be written down, with their defaults."""
    found: dict[str, inspect.Parameter] = {}
    for kind in METHODS[method].__mro__:
        parameters = inspect.signature(kind.__init__).parameters if "__init__" in vars(kind) else {}
        found = {**parameters, **found}
        if parameters and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            break  # the rest of the classes are given nothing more
    return {
        name: parameter
        for name, parameter in found.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in NOT_WRITTEN
    }


def check_options(method: str, options: dict[str, Any]) -> None:
    """That a method's class has these options, and that one whose default is a number is given a number.

    Raises:
        ValueError: for the first that is not so; one sentence.
    """
    known = options_of(method)
    for name, value in options.items():
        if name not in known:
            of_recipe = [field for field in Recipe.__dataclass_fields__ if field not in KEPT]
            near = difflib.get_close_matches(name, [*of_recipe, *known], 1)
            raise ValueError(
                f"Neither the recipe nor {method} has a {name!r}{f' (did you mean {near[0]}?)' if near else ''}; the "
                f"recipe has {', '.join(of_recipe)}, {method} {', '.join(known) or 'no options'}."
            )
        _check_like(name, value, known[name].default)


def changed(recipe: Recipe, name: str, value: Any) -> Recipe:
    """The recipe with another value of one of its fields, or else of one of its method's options.

    Where both have a field of that name (the schedule of `StageByStage`), the value says whose it is.

    Raises:
        ValueError: for a value that a training could not use, and for a name that neither has; one sentence.
    """
    of_recipe = name in Recipe.__dataclass_fields__ and name not in KEPT
    if of_recipe and not (name == "schedule" and value not in SCHEDULES and name in options_of(recipe.method)):
        if name in ("milestones", "meta_betas") and isinstance(value, list):
            value = tuple(value)
        return replace(recipe, **{name: value})
    check_options(recipe.method, {name: value})
    return replace(recipe, options={**recipe.options, name: value})


def as_rows(recipe: Recipe) -> list[tuple[str, str]]:
    """Name and value of every hyper-parameter, to be printed."""
    return [(name, str(value)) for name, value in asdict(recipe).items()]

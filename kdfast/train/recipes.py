"""The schedules of the papers, by name; what a paper leaves open is kdfast's choice and said so."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any


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

    def scaled(self, epochs: int) -> "Recipe":
        """The same recipe in `epochs`, its milestones and warm-up in proportion."""
        share = epochs / self.epochs
        return replace(
            self,
            epochs=epochs,
            milestones=tuple(round(milestone * share) for milestone in self.milestones),
            warmup=round(self.warmup * share),
        )

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Recipe":
        """From what `dataclasses.asdict` made, and JSON of it."""
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


def as_rows(recipe: Recipe) -> list[tuple[str, str]]:
    """Name and value of every hyper-parameter, to be printed."""
    return [(name, str(value)) for name, value in asdict(recipe).items()]

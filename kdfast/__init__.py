"""kdfast: fast knowledge distillation, and meta-learned distillation made practical."""

from kdfast import _native  # noqa: F401  (first: it registers the compiled kernels)
from kdfast.backends import show_backends
from kdfast.losses import (
    KDLoss,
    dkd_loss,
    exits_kd_loss,
    generalized_jsd_loss,
    hcl,
    incorrect_brier,
    kd_loss,
    pathway_distances,
    pathway_loss,
    topk_kd_loss,
    topk_teacher,
)
from kdfast.meta import MetaStepReport, Process, exact_hypergradient, meta_kd_step
from kdfast.methods import (
    KD,
    MKD,
    Alone,
    DeeplySupervised,
    Distiller,
    DistPro,
    MetaDistiller,
    SelfDistillation,
    SelfGuidance,
)

__version__ = "0.1.0"
__all__ = [
    "KD",
    "MKD",
    "Alone",
    "DeeplySupervised",
    "DistPro",
    "Distiller",
    "KDLoss",
    "MetaDistiller",
    "MetaStepReport",
    "Process",
    "SelfDistillation",
    "SelfGuidance",
    "dkd_loss",
    "exact_hypergradient",
    "exits_kd_loss",
    "generalized_jsd_loss",
    "hcl",
    "incorrect_brier",
    "kd_loss",
    "meta_kd_step",
    "pathway_distances",
    "pathway_loss",
    "show_backends",
    "topk_kd_loss",
    "topk_teacher",
]

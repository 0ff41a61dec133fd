"""What users call: arguments checked, the op called, the result reduced."""

from kdfast.losses.incorrect_brier import incorrect_brier
from kdfast.losses.kd_kl import KDLoss, kd_loss
from kdfast.losses.kd_kl_drop_in import dkd_loss, generalized_jsd_loss
from kdfast.losses.kd_kl_exits import exits_kd_loss
from kdfast.losses.pathways import hcl, pathway_distances, pathway_loss
from kdfast.losses.topk import topk_kd_loss, topk_teacher

__all__ = [
    "KDLoss",
    "dkd_loss",
    "exits_kd_loss",
    "generalized_jsd_loss",
    "hcl",
    "incorrect_brier",
    "kd_loss",
    "pathway_distances",
    "pathway_loss",
    "topk_kd_loss",
    "topk_teacher",
]

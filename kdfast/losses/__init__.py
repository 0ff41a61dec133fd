"""What users call: arguments checked, the op called, the result reduced."""

from kdfast.losses.kd_kl import KDLoss, kd_loss
from kdfast.losses.pathways import hcl, pathway_distances, pathway_loss

__all__ = ["KDLoss", "hcl", "kd_loss", "pathway_distances", "pathway_loss"]

"""What users call: arguments checked, the op called, the result reduced."""

from kdfast.losses.kd_kl import KDLoss, kd_loss
from kdfast.losses.kd_kl_drop_in import dkd_loss, generalized_jsd_loss

__all__ = ["KDLoss", "dkd_loss", "generalized_jsd_loss", "kd_loss"]

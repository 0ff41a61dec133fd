"""What users call: arguments checked, the op called, the result reduced."""

from kdfast.losses.kd_kl import KDLoss, kd_loss

__all__ = ["KDLoss", "kd_loss"]

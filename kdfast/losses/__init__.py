"""What users call: arguments checked, the op called, the result reduced."""

from kdfast.losses.incorrect_brier import incorrect_brier
from kdfast.losses.kd_kl import KDLoss, kd_loss

__all__ = ["KDLoss", "incorrect_brier", "kd_loss"]

"""The definitions: one op a file, in plain PyTorch."""

from kdfast.reference.kd_kl import kd_kl

__all__ = ["kd_kl"]

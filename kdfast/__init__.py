"""kdfast: fast knowledge distillation, and meta-learned distillation made practical."""

from kdfast import _native  # noqa: F401  (first: it registers the compiled kernels)
from kdfast.losses import KDLoss, kd_loss

__version__ = "0.1.0"
__all__ = ["KDLoss", "kd_loss"]

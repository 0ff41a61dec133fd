"""Meta-gradients: what the meta-parameters do to the validation loss through one step of the student."""

from kdfast.meta.engine import MetaKD, MetaStepReport
from kdfast.meta.hypergradient import exact_hypergradient
from kdfast.meta.process import Process
from kdfast.meta.step import meta_kd_step

__all__ = ["MetaKD", "MetaStepReport", "Process", "exact_hypergradient", "meta_kd_step"]

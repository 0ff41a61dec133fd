"""Meta-gradients: what the meta-parameters do to the validation loss through one step of the student."""

from kdfast.meta.hypergradient import exact_hypergradient
from kdfast.meta.process import Process
from kdfast.meta.step import MetaStepReport, meta_kd_step

__all__ = ["MetaStepReport", "Process", "exact_hypergradient", "meta_kd_step"]

"""The methods: each a student, perhaps a teacher, and a loss in two halves (see `kdfast.methods.base`)."""

from kdfast.methods.base import Distiller
from kdfast.methods.distpro import DistPro, PathwayWeights
from kdfast.methods.kd import KD, Alone
from kdfast.methods.metadistiller import DeeplySupervised, MetaDistiller, SelfDistillation
from kdfast.methods.mkd import MKD, Temperatures, incorrect_brier
from kdfast.methods.self_guidance import SelfGuidance

METHODS: dict[str, type[Distiller]] = {  # by their names on the command line
    "alone": Alone,
    "kd": KD,
    "mkd": MKD,
    "distpro": DistPro,
    "metadistiller": MetaDistiller,
    "self_guidance": SelfGuidance,
    "dsn": DeeplySupervised,
    "sd": SelfDistillation,
}

__all__ = [
    "KD",
    "METHODS",
    "MKD",
    "Alone",
    "DeeplySupervised",
    "DistPro",
    "Distiller",
    "MetaDistiller",
    "PathwayWeights",
    "SelfDistillation",
    "SelfGuidance",
    "Temperatures",
    "incorrect_brier",
]

"""The methods: each a student, perhaps a teacher, and a loss in two halves (see `kdfast.methods.base`)."""

from kdfast.methods.base import Distiller
from kdfast.methods.crd import CRD, ContrastiveHead
from kdfast.methods.distpro import DistPro
from kdfast.methods.hints import AT, NST, FitNet
from kdfast.methods.kd import KD, Alone, BornAgain
from kdfast.methods.metadistiller import DeeplySupervised, MetaDistiller, SelfDistillation
from kdfast.methods.mkd import MKD, Temperatures, incorrect_brier
from kdfast.methods.mutual import DML, ONE
from kdfast.methods.pathway_weights import PathwayWeights, transfer
from kdfast.methods.reviewkd import ReviewKD
from kdfast.methods.self_guidance import SelfGuidance
from kdfast.methods.stagewise import StageByStage

METHODS: dict[str, type[Distiller]] = {  # by the name on the command line
    "alone": Alone,
    "kd": KD,
    "mkd": MKD,
    "distpro": DistPro,
    "metadistiller": MetaDistiller,
    "self_guidance": SelfGuidance,
    "stagewise": StageByStage,
    "fitnet": FitNet,
    "at": AT,
    "nst": NST,
    "dml": DML,
    "one": ONE,
    "reviewkd": ReviewKD,
    "crd": CRD,
    "born_again": BornAgain,
    "dsn": DeeplySupervised,
    "sd": SelfDistillation,
}

__all__ = [
    "AT",
    "CRD",
    "DML",
    "KD",
    "METHODS",
    "MKD",
    "NST",
    "ONE",
    "Alone",
    "BornAgain",
    "ContrastiveHead",
    "DeeplySupervised",
    "DistPro",
    "Distiller",
    "FitNet",
    "MetaDistiller",
    "PathwayWeights",
    "ReviewKD",
    "SelfDistillation",
    "SelfGuidance",
    "StageByStage",
    "Temperatures",
    "incorrect_brier",
    "transfer",
]

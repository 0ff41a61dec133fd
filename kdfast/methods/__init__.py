"""The methods: each a student, perhaps a teacher, and a loss in two halves (see `kdfast.methods.base`)."""

from kdfast.methods.base import Distiller
from kdfast.methods.distpro import DistPro, PathwayWeights
from kdfast.methods.kd import KD, Alone
from kdfast.methods.mkd import MKD, Temperatures, incorrect_brier

METHODS: dict[str, type[Distiller]] = {"alone": Alone, "kd": KD, "mkd": MKD, "distpro": DistPro}  # by command-line name

__all__ = ["KD", "METHODS", "MKD", "Alone", "DistPro", "Distiller", "PathwayWeights", "Temperatures", "incorrect_brier"]

"""Data sets as tensors in memory, and batches of them."""

from kdfast.data.digits import DigitsSplit, load_digits
from kdfast.data.streams import LOADERS, Stream, Streams, loaders
from kdfast.data.tensors import ImageSet, TensorLoader

__all__ = ["LOADERS", "DigitsSplit", "ImageSet", "Stream", "Streams", "TensorLoader", "load_digits", "loaders"]

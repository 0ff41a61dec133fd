"""Images that stay in their files until a batch needs them, and what happens to those that cannot be read."""

import contextlib
import io
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

ON_BROKEN = ("stop", "skip")


class Broken:
    """What is done about images that cannot be read; one for all streams of a data set.

    Args:
        on_broken: "stop" at the first, or "skip" them, each named in a warning.
        limit: how many are skipped; one more stops too.
    """

    def __init__(self, on_broken: str = "stop", limit: int = 100):
        if on_broken not in ON_BROKEN:
            raise ValueError(f"on_broken must be one of {', '.join(map(repr, ON_BROKEN))}, got {on_broken!r}.")
        if limit < 1:
            raise ValueError(f"broken_limit must be at least 1, got {limit}; to skip none say on_broken 'stop'.")
        self.on_broken, self.limit = on_broken, limit
        self.paths: list[str] = []
        self._lock = threading.Lock()  # two streams may find one at once

    def found(self, path: str, reason: str) -> None:
        """Note a broken image, once.

        Raises:
            ValueError: where it is to stop the run, or is one too many.
        """
        with self._lock:
            if path in self.paths:
                return
            if self.on_broken == "stop":
                raise ValueError(
                    f"{path} cannot be read as an image ({reason}); remove it, or pass over such with on_broken 'skip'."
                )
            self.paths.append(path)
            if len(self.paths) > self.limit:
                named = ", ".join(self.paths[:3])
                raise ValueError(
                    f"More than {self.limit} images cannot be read ({named}, ...); repair them, or raise broken_limit."
                )
        warnings.warn(f"{path} cannot be read as an image ({reason}) and is skipped.", stacklevel=2)


class Files:
    """Images in files, each with its class.

    Args:
        paths: one an image.
        labels: [count], int64.
        broken: what is done about those that cannot be read.
        shape: (channels, height, width) of what a batch holds.
        resize: whether images are cut and resized to that shape; if not, all have that size.
    """

    def __init__(self, paths: Sequence[str], labels: Tensor, broken: Broken, shape: tuple[int, int, int], resize: bool):
        self.paths, self.labels, self.broken, self.shape, self.resize = list(paths), labels, broken, shape, resize
        self._unreadable: set[int] = set()

    def read(self, sample: int) -> bytes:
        return Path(self.paths[sample]).read_bytes()

    def mark(self, sample: int, reason: str) -> None:
        """The image of this index cannot be read; raises as `Broken.found` does."""
        self.broken.found(self.paths[sample], reason)
        self._unreadable.add(sample)

    def readable(self, samples: np.ndarray, members: np.ndarray) -> np.ndarray:
        """`samples`, each that is known as broken replaced by the next of `members` (sorted) that is not."""
        if not self._unreadable:
            return samples
        return np.array([self._next(int(sample), members) for sample in samples], np.int64)

    def _next(self, sample: int, members: np.ndarray) -> int:
        at = int(np.searchsorted(members, sample))
        for step in range(len(members)):
            candidate = int(members[(at + step) % len(members)])
            if candidate not in self._unreadable:
                return candidate
        raise ValueError("None of the images of this part can be read.")


def size_of(content: bytes | Path) -> tuple[int, int]:
    """Height and width, from the head of an image file; raises OSError where that cannot be read."""
    with _opened(content) as image:
        return image.height, image.width


def decoded(content: bytes | Path):
    """The whole of an image file as an RGB PIL image; raises OSError where it cannot be read."""
    with _opened(content) as image:
        return image.convert("RGB")


@contextlib.contextmanager
def _opened(content: bytes | Path):
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            yield image
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what its plugins raise on odd bytes
        raise OSError(str(error)) from error


def inner_boxes(heights: np.ndarray, widths: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """For an image that is only looked at: what the whole is resized to, and where the middle is cut out of that.

    The shorter side becomes 256/224 of `size`, as is usual on ImageNet.

    Returns:
        [batch, 2] height and width after resizing, [batch, 2] top and left of the middle `size` x `size`.
    """
    short = round(size * 256 / 224)
    sizes = np.stack([heights, widths], 1)
    scaled = np.maximum((sizes * short) // sizes.min(1, keepdims=True), short)  # rounded down, as torchvision does
    return scaled, np.rint((scaled - size) / 2).astype(np.int64)

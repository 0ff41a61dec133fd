"""What a teacher says about augmented images that come again, kept in a folder: each is asked for once.

FOLDER/teacher.json   what it holds and what that depends on
FOLDER/teacher.rows   float32, a row for each augmentation and image: the logits, and pooled features where a method
                      needs them
FOLDER/teacher.sums   uint64, a checksum of each row; 0 where there is none yet
FOLDER/teacher.lock   held while one of several trainings makes these
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.data import Stream
from kdfast.data.files import Files
from kdfast.methods.base import Distiller
from kdfast.train.files import digest, write_json

_PRESENT = 1 << 32  # a checksum of zero is no empty place
_RESERVES = hasattr(os, "posix_fallocate")  # not on macOS


class TeacherCache:
    """The teacher's outputs by (variant of the augmentation, image).

    Rows are written as they are first computed, and checked whenever they are read; one that does not match its
    checksum is computed again. Its place on the disk is taken when it is opened. Several trainings of one machine may
    use the folder at once.

    Args:
        folder: where it is; made if need be.
        distiller: whose `teacher_outputs` are kept.
        stream: of the training images.
        epochs: of the training, at most so many variants come.
        about: whatever else the outputs depend on, as the precision.

    Attributes:
        size: bytes of the whole cache, known before it is filled.
        begun_anew: what was there before and why it is not used, in a sentence; None if nothing was or it is used.
        hits, asked: images answered from the cache, and all.

    Raises:
        ValueError: where the method's teacher outputs are no logits, images are mixed, or the disk is too small.
        OSError: where its files cannot be made or written to; one sentence.
    """

    def __init__(self, folder: Path, distiller: Distiller, stream: Stream, epochs: int, about: str = ""):
        name = type(distiller).__name__
        if distiller.teacher is None:
            raise ValueError(f"{name} has no teacher whose outputs could be cached; leave out --cache-teacher.")
        if stream.augment.mixes:
            raise ValueError(
                "The teacher's outputs cannot be cached where images are mixed, as no mixture comes again; leave out "
                "--cache-teacher, or mixup and cutmix."
            )
        self.folder, self.distiller = Path(folder), distiller
        self._pools = getattr(distiller, "pools_teacher", False)
        self._device = next(distiller.parameters()).device
        row = self._row(distiller.teacher_outputs(torch.zeros(1, *stream.work.shape, device=self._device)))
        self._widths = [part.shape[1] for part in row]
        random = stream.augment != type(stream.augment)()
        self.variants = min(stream.variants or epochs, epochs) if random else 1
        self.images, self.width = len(stream.data.labels), sum(self._widths)
        self.size = sum(self._sizes())
        self._facts = {
            "teacher": digest(distiller.teacher.state_dict(), type(distiller.teacher).__name__),
            "data": _data_digest(stream),
            "augmentation": f"{stream.augment}, seed {stream.seed}, loader {stream.loader}",
            "precision": about,
            "layout": f"{self.variants} variants of {self.images} images, {self._widths} numbers each",
        }
        self.begun_anew = None
        self.hits = self.asked = 0
        self._rows = self._sums = None

    def open(self) -> None:
        """Use what is there, if it is of this teacher and these data, or else begin anew: before others join."""
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._explained(), open(self.folder / "teacher.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            held = self._held()
            if held != self._facts:
                if held:
                    changed = ", ".join(name for name in self._facts if held.get(name) != self._facts[name])
                    self.begun_anew = (
                        f"The cache in {self.folder} is of other outputs ({changed} changed) and begins anew."
                    )
                self._begin()
            self.join()

    def _begin(self) -> None:
        for path in self._files():
            path.unlink(missing_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < self.size:
            raise ValueError(
                f"The teacher's cache takes {in_bytes(self.size)}, {self.folder} has {in_bytes(free)} left; ask "
                "for fewer variants, or name another folder."
            )
        facts, *files = self._files()
        try:
            for path, size in zip(files, self._sizes(), strict=True):
                with open(path, "wb") as file:
                    # A file with holes would end the process (SIGBUS) if others have filled the disk meanwhile.
                    os.posix_fallocate(file.fileno(), 0, size) if _RESERVES else file.truncate(size)
            write_json(facts, self._facts)
        except OSError:
            for path in self._files():
                path.unlink(missing_ok=True)
            raise

    def _files(self) -> list[Path]:
        return [self.folder / f"teacher.{part}" for part in ("json", "rows", "sums")]

    def _sizes(self) -> tuple[int, int]:
        """Bytes of the rows and of their checksums."""
        count = self.variants * self.images
        return 4 * self.width * count, 8 * count

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"The teacher's cache in {self.folder} cannot be used ({error.strerror or error}); name another.",
            ) from error

    def join(self) -> None:
        """Use what another process has opened."""
        shape, (_, rows, sums) = (self.variants, self.images), self._files()
        with self._explained():
            self._rows = np.memmap(rows, np.float32, "r+", shape=(*shape, self.width))
            self._sums = np.memmap(sums, np.uint64, "r+", shape=shape)

    def _held(self) -> dict[str, str]:
        try:
            held = dict(json.loads(self._files()[0].read_text(encoding="utf-8")))
            sizes = tuple(path.stat().st_size for path in self._files()[1:])
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError):  # no JSON, or no dict
            return {**self._facts, "layout": "unreadable"}
        if held == self._facts and sizes != self._sizes():
            return {**held, "layout": "files of another size"}
        return held

    def outputs(self, stream: Any, inputs: Tensor) -> Any:
        """The teacher's outputs for the batch the stream has just given."""
        variant, samples = stream.variant % self.variants, stream.samples.numpy()
        sums = self._sums[variant, samples]  # before the rows, which another training writes before them
        rows = self._rows[variant, samples]
        right = [int(held) == _PRESENT | zlib.crc32(row.data) for row, held in zip(rows, sums, strict=True)]
        self.asked += len(samples)
        if all(right):
            self.hits += len(samples)
            return self._as_outputs(torch.from_numpy(rows).to(inputs.device))
        if any(held and not fine for held, fine in zip(sums, right, strict=True)):
            warnings.warn(f"Rows of {self.folder} were damaged and are computed again.", stacklevel=2)
        outputs = self.distiller.teacher_outputs(inputs)
        rows = torch.cat(self._row(outputs), 1).float().cpu().numpy()  # [batch, width]
        self._rows[variant, samples] = rows
        self._sums[variant, samples] = [_PRESENT | zlib.crc32(row.data) for row in rows]
        return self._as_outputs(torch.from_numpy(rows).to(inputs.device))

    def _row(self, outputs: Any) -> list[Tensor]:
        """The parts [batch, numbers] of what is kept: logits, and the mean of the last feature map."""
        if isinstance(outputs, Tensor) and outputs.dim() == 2:
            return [outputs]
        if self._pools and isinstance(outputs, tuple) and outputs[1][-1].dim() == 4:
            return [outputs[0], outputs[1][-1].mean((2, 3))]
        raise ValueError(
            f"{type(self.distiller).__name__} needs more of its teacher than logits and pooled features, which is not "
            "cached; leave out --cache-teacher."
        )

    def _as_outputs(self, rows: Tensor) -> Any:
        logits, *features = rows.split(self._widths, 1)
        return (logits, [features[0][:, :, None, None]]) if features else logits


def in_bytes(size: int) -> str:
    """Rounded up, in MB, or in kB where those would be few."""
    unit, name = (1e6, "MB") if size >= 1e7 else (1e3, "kB")
    return f"{math.ceil(size / unit):,} {name}"


def _data_digest(stream: Stream) -> str:
    """Of every pixel in memory; of images in files their names, sizes and times."""
    data, work = stream.data, stream.work
    text = f"{work.shape} {work.mean.flatten().tolist()} {work.deviation.flatten().tolist()}"
    if not isinstance(data, Files):
        return digest({"images": data.images.cpu(), "labels": data.labels.cpu()}, text)
    sha = hashlib.sha256(text.encode())
    for path, label in zip(data.paths, data.labels.tolist(), strict=True):
        try:
            found = os.stat(path)
            about = f"{found.st_size} {found.st_mtime_ns}"
        except OSError:  # it is for the stream to stop at it or to skip it
            about = "unreadable"
        sha.update(f"{path} {label} {about}\n".encode())
    return sha.hexdigest()

import dataclasses
import errno
import fcntl
import json
import os
import threading

import pytest
import torch
from torch import nn

from kdfast.data import Stream, loaders
from kdfast.methods import CRD, KD, MKD, Alone, DistPro
from kdfast.models import CifarResNet
from kdfast.train.checkpoint import seed_everything
from kdfast.train.networks import write_student
from kdfast.train.recipes import default_recipe
from kdfast.train.run import Numbered, Run, Settings
from kdfast.train.teacher_cache import TeacherCache
from kdfast.train.trainer import Trainer
from tests.data.images import pictures, write_folder


class Counted(nn.Module):
    """A teacher that counts what it is asked."""

    def __init__(self, network):
        super().__init__()
        self.network, self.widths, self.images = network, network.widths, 0

    def forward(self, x, features=False):
        self.images += len(x)
        return self.network(x, features=features)


def stream(count=24, **options):
    options = {"seed": 1, "augment": "crop_flip", "classes": 4, **options}
    return Stream(pictures(count, 16), torch.full((3,), 128.0), torch.full((3,), 64.0), 8, **options)


def distiller(kind=KD, seed=0, **options):
    torch.manual_seed(0)
    student = CifarResNet(8, (2, 2, 4), in_channels=3, classes=4)
    torch.manual_seed(seed)
    return kind(student, Counted(CifarResNet(8, (4, 4, 4), in_channels=3, classes=4)), **options)


def opened(folder, method=None, data=None, epochs=2, about="fp32"):
    cache = TeacherCache(folder, method or distiller(), data or stream(), epochs, about)
    cache.open()
    cache.distiller.teacher.images = 0
    return cache


def trained(method, batches, cache=None, epochs=2, **options):
    optimizer = torch.optim.SGD(method.inner_parameters(), lr=0.05, momentum=0.9)
    Trainer(method, batches, optimizer, epochs=epochs, teacher_cache=cache, **options).run()
    return torch.cat([p.detach().flatten() for p in method.parameters()])


def test_each_augmented_image_is_asked_for_once_and_the_training_is_the_same(tmp_path):
    expected = trained(distiller(), stream())
    for asked in (48, 0):  # a second training finds all of it
        method = distiller()
        cache = opened(tmp_path / "cache", method)
        assert torch.equal(trained(method, stream(), cache), expected)
        assert (method.teacher.images, cache.hits) == (asked, 48 - asked) and cache.begun_anew is None


def test_variants_that_recur_are_asked_for_once(tmp_path):
    expected = trained(distiller(), stream(variants=2), epochs=4)
    method, data = distiller(), stream(variants=2)
    cache = opened(tmp_path, method, data, epochs=4)
    assert cache.variants == 2
    assert torch.equal(trained(method, data, cache, epochs=4), expected) and method.teacher.images == 48
    assert opened(tmp_path / "plain", data=stream(augment="none"), epochs=9).variants == 1


def test_size_is_known_beforehand_and_is_that_of_the_files(tmp_path):
    cache = TeacherCache(tmp_path / "cache", distiller(), stream(), 2)
    assert not (tmp_path / "cache").exists() and cache.size == 2 * 24 * (4 * 4 + 8)
    cache.open()
    assert cache.size == sum((tmp_path / "cache" / f"teacher.{part}").stat().st_size for part in ("rows", "sums"))


def test_meta_steps_and_accumulation_take_it_too(tmp_path):
    results = []
    for folder in (None, tmp_path, tmp_path):
        method = distiller(MKD)
        options = {
            "meta_optimizer": torch.optim.Adam(method.meta_parameters(), 0.1),
            "validation_batches": stream(seed=2),
        }
        results.append(trained(method, stream(), folder and opened(folder, method), **options))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    accumulated = [
        trained(method := distiller(), stream(), opened(tmp_path / "b", method) if cached else None, accumulate=3)
        for cached in (False, True, True)
    ]
    assert torch.equal(accumulated[0], accumulated[1]) and torch.equal(accumulated[0], accumulated[2])


def test_pooled_features_are_kept_for_crd(tmp_path):
    labels = stream().labels
    results = []
    for folder in (None, tmp_path, tmp_path):
        method = distiller(CRD, labels=labels, negatives=8)
        data = stream()
        results.append(trained(method, Numbered(data), folder and opened(folder, method, data)))
    # The mean over a map and the mean of that mean are one number.
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert opened(tmp_path, method, data).width == 4 + 4 and method.teacher.images == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"method": lambda: distiller(seed=1)}, "teacher"),
        ({"data": lambda: stream(25)}, "data, layout"),
        ({"data": lambda: stream(seed=2)}, "augmentation"),
        ({"data": lambda: stream(augment="crop_flip+cutout")}, "augmentation"),
        ({"about": lambda: "bf16"}, "precision"),
        ({"epochs": lambda: 3}, "layout"),
    ],
)
def test_it_begins_anew_when_what_it_depends_on_has_changed(tmp_path, change, named):
    trained(method := distiller(), stream(), opened(tmp_path, method))
    cache = opened(tmp_path, **{name: make() for name, make in change.items()})
    assert cache.begun_anew == f"The cache in {tmp_path} is of other outputs ({named} changed) and begins anew."
    assert not cache._sums.any()


def test_changed_pixels_are_other_data(tmp_path):
    opened(tmp_path)
    data = stream()
    data.data.images[3, 0, 0, 0] ^= 1
    assert "(data changed)" in opened(tmp_path, data=data).begun_anew


def test_files_are_other_data_once_one_is_written_anew_or_gone(tmp_path):
    root = write_folder(tmp_path / "images", sides=(64, 80))
    first = sorted((root / "train" / "class0").iterdir())[0]

    def begun_anew():
        data = loaders(f"folder:{root}", batch_size=8, size=16, workers=0, on_broken="skip").train
        return opened(tmp_path / "cache", data=data).begun_anew

    assert begun_anew() is None and begun_anew() is None
    for change in (first.touch, first.unlink, lambda: first.symlink_to("nowhere")):
        change()
        assert "(data" in begun_anew()


def test_damaged_rows_are_found_and_computed_again(tmp_path):
    expected = trained(method := distiller(), stream(), opened(tmp_path, method))
    rows = bytearray((tmp_path / "teacher.rows").read_bytes())
    rows[100] ^= 1
    (tmp_path / "teacher.rows").write_bytes(rows)
    method = distiller()
    with pytest.warns(UserWarning, match="were damaged and are computed again"):
        assert torch.equal(trained(method, stream(), opened(tmp_path, method)), expected)
    assert method.teacher.images == 8  # the batch with that row
    method = distiller()
    assert torch.equal(trained(method, stream(), opened(tmp_path, method)), expected) and method.teacher.images == 0


def test_cut_or_edited_files_begin_anew(tmp_path):
    for spoil in (
        lambda: (tmp_path / "teacher.rows").write_bytes(b"short"),
        lambda: (tmp_path / "teacher.json").write_text("{"),
        lambda: (tmp_path / "teacher.json").write_text(json.dumps([1])),
    ):
        opened(tmp_path)
        spoil()
        assert "(layout changed)" in opened(tmp_path).begun_anew


def test_a_training_says_the_size_and_what_changed(tmp_path):
    """From its settings, as the command line does."""
    seed_everything(0)
    recipe = dataclasses.replace(default_recipe("kd").scaled(2), batch_size=100)
    about = {"network": "resnet8(widths=(2,2,4))", "classes": 10, "shape": (1, 8, 8), "epoch": 0, "accuracy": None}
    teacher = CifarResNet(8, (2, 2, 4), in_channels=1, classes=10)
    file = str(write_student(tmp_path / "teacher.safetensors", teacher, about))
    told, results = [], []
    for seed, cache in ((0, None), (0, "cache"), (0, "cache"), (1, "cache")):
        (folder := tmp_path / str(len(results))).mkdir()
        settings = Settings(
            recipe, "digits", about["network"], file, seed=seed, cache_teacher=cache and str(tmp_path / cache)
        )
        run = Run(settings, folder, say=told.append)
        run.run()
        results.append((run.trainer.student.state_dict(), run.trainer.teacher_cache))
    for name, value in results[0][0].items():
        assert torch.equal(value, results[1][0][name]) and torch.equal(value, results[2][0][name])
    assert [cache.hits for _, cache in results[1:]] == [0, 2000, 0]
    size = f"The teacher's outputs are kept in {tmp_path / 'cache'}: 96 kB for 2 variant(s) of 1000 images."
    anew = f"The cache in {tmp_path / 'cache'} is of other outputs (augmentation changed) and begins anew."
    assert told == [size, size, size, anew] and results[1][1]._facts["precision"] == "fp32 on cpu"
    assert 0 <= run.results()["last"]["waiting"] < 1


def test_processes_end_with_the_sentence_of_the_first(tmp_path, monkeypatch):
    """The second of two, which would wait for a cache that is not made."""
    network = "resnet8(widths=(2,2,4))"
    about = {"network": network, "classes": 10, "shape": (1, 8, 8), "epoch": 0, "accuracy": None}
    teacher = CifarResNet(8, (2, 2, 4), in_channels=1, classes=10)
    file = str(write_student(tmp_path / "teacher.safetensors", teacher, about))
    settings = Settings(default_recipe("kd"), "digits", network, file, cache_teacher=str(tmp_path / "cache"))
    monkeypatch.setattr("kdfast.train.run.distributed.rank", lambda: 1)
    monkeypatch.setattr("kdfast.train.run.distributed.gathered", lambda value: [OSError(28, "no room"), value])
    with pytest.raises(OSError, match="no room"):
        Run(settings, tmp_path)


def test_its_place_on_the_disk_is_taken_at_once(tmp_path, monkeypatch):
    """A file with holes ends the process where others have filled the disk before it has."""
    opened(tmp_path)
    for part in ("rows", "sums"):
        found = (tmp_path / f"teacher.{part}").stat()
        assert found.st_blocks * 512 >= found.st_size > 0

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"The teacher's cache in .* cannot be used \(No space left on device\)"):
        opened(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["teacher.lock"]


def test_unusable_folders_are_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=rf"cache in {folder} cannot be used \(.*\); name another") as raised:
            opened(folder)
        assert "cannot be used" in raised.value.strerror  # what the command line prints


def test_trainings_that_begin_at_once_make_it_one_after_another(tmp_path):
    cache = TeacherCache(tmp_path, distiller(), stream(), 2)
    with open(tmp_path / "teacher.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another is making it
        opening = threading.Thread(target=cache.open)
        opening.start()
        opening.join(0.3)
        assert opening.is_alive() and not (tmp_path / "teacher.rows").exists()
    opening.join()
    before = (tmp_path / "teacher.rows").stat().st_ino
    other = opened(tmp_path, about="")
    assert other.begun_anew is None and (tmp_path / "teacher.rows").stat().st_ino == before


@pytest.mark.filterwarnings("error")  # none is damaged
def test_rows_that_another_training_writes_meanwhile_are_not_taken_for_damaged(tmp_path):
    reader, writer = opened(tmp_path), opened(tmp_path)
    data = stream()
    images, _ = next(iter(data))

    class Rows:
        """Read just before the other writes them."""

        def __getitem__(self, at):
            old = writer._rows[at]
            writer.outputs(data, images)
            return old

        def __setitem__(self, at, rows):
            writer._rows[at] = rows

    reader._rows = Rows()
    assert torch.equal(reader.outputs(data, images), reader.distiller.teacher_outputs(images)) and reader.hits == 0


def test_what_cannot_be_cached_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="DistPro needs more of its teacher than logits and pooled features"):
        opened(tmp_path, distiller(DistPro))
    with pytest.raises(ValueError, match="Alone has no teacher whose outputs could be cached"):
        opened(tmp_path, Alone(CifarResNet(8, (2, 2, 4))))
    with pytest.raises(ValueError, match="cannot be cached where images are mixed"):
        opened(tmp_path, data=stream(augment="mixup"))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(ValueError, match=r"The teacher's cache takes 2 kB, .* has 1 kB left; ask for fewer variants"):
        opened(tmp_path / "full")

"""The CPU's kernel of the resident loader against its definition, to the bit."""

import pytest
import torch

from kdfast import _native
from kdfast.data import Stream
from kdfast.data.resident import augment_images
from tests.data.images import pictures

needs_kernel = pytest.mark.skipif(not _native.has_kernel("augment_images", "CPU"), reason="no compiled kernels")


def inputs(shape, shift, kind, count=5, batch=40):
    """Every image of a small set, the first and the last at every corner: reads must end where the set does."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *shape), generator=generator).to(kind)
    samples = torch.cat([torch.tensor([0, count - 1]), torch.arange(batch - 2) % count])
    corners = torch.randint(2 * shift + 1, (batch, 2), generator=generator)
    corners[:8] = torch.tensor([[0, 0], [2 * shift, 2 * shift], [0, 2 * shift], [2 * shift, 0]]).repeat(2, 1)
    flips = torch.rand(batch, generator=generator) < 0.5
    start = torch.stack([torch.randint(size + 1, (batch,), generator=generator) for size in shape[1:]], 1)
    squares = torch.cat([start, torch.minimum(start + 3, torch.tensor(shape[1:]))], 1)
    scale, offset = torch.rand(2, shape[0], generator=generator) + 0.01
    return images, samples, corners, flips, shift, scale, -offset, squares


@needs_kernel
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("shape", "shift"),
    [
        ((3, 32, 32), 4),  # CIFAR's: whole vectors
        ((3, 64, 64), 0),
        ((1, 10, 45), 3),  # a vector and a rest
        ((2, 7, 5), 2),  # less than one
        ((3, 16, 3), 5),  # cuts that miss the image altogether
        ((1, 1, 1), 1),
    ],
)
def test_kernel_is_the_definition(shape, shift, kind):
    given = inputs(shape, shift, kind)
    nothing = torch.zeros_like(given[3])
    for flips in (given[3], nothing, ~nothing):
        for squares in (given[-1], None):
            arguments = (*given[:3], flips, *given[4:-1], squares)
            result = torch.ops.kdfast.augment_images(*arguments)
            assert result.shape == (40, *shape) and result.dtype == torch.float32
            assert torch.equal(result, augment_images(*arguments))


@needs_kernel
def test_threads_share_large_batches_and_change_nothing():
    given = inputs((3, 128, 128), 16, torch.uint8)  # 2 million pixels
    expected = augment_images(*given)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(torch.ops.kdfast.augment_images(*given), expected)
    finally:
        torch.set_num_threads(threads)


@needs_kernel
def test_an_image_of_another_set_is_refused():
    images, samples, *others = inputs((1, 4, 4), 1, torch.uint8)
    for wrong in (-1, len(images)):
        with pytest.raises(RuntimeError, match="an image of another set"):
            torch.ops.kdfast.augment_images(images, samples.clone().fill_(wrong), *others)


def test_images_that_lie_otherwise_in_memory_and_doubles_are_taken():
    data = pictures(16)
    plain, other, double = (
        Stream(data._replace(images=images), torch.ones(3), torch.ones(3), 8, seed=0, augment="crop_flip+cutout")
        for images in (data.images, data.images.contiguous(memory_format=torch.channels_last), data.images.double())
    )
    for (expected, _), (images, _), (doubles, _) in zip(plain, other, double, strict=True):
        assert torch.equal(expected, images) and torch.equal(expected, doubles)


def test_random_numbers_drawn_for_many_batches_are_those_of_each():
    data, options = pictures(24), {"seed": 3, "augment": "crop_flip+cutout", "loader": "resident"}
    at_once = Stream(data, torch.zeros(3), torch.ones(3), 2, **options)
    given = [(images, at_once.samples) for images, _ in at_once]
    for position in range(12):
        alone = Stream(data, torch.zeros(3), torch.ones(3), 2, **options)
        alone.load_state_dict({"epoch": 0, "position": position})
        images, _ = next(iter(alone))
        assert torch.equal(alone.samples, given[position][1]) and torch.equal(images, given[position][0])

import pytest
import torch

from kdfast.data import ImageSet, TensorLoader


def numbered(count, size=4):
    """Images that are all different, and whose labels are their own indices."""
    images = torch.arange(count * size * size, dtype=torch.float32).reshape(count, 1, size, size) + 1
    return ImageSet(images, torch.arange(count))


def test_a_pass_gives_full_batches_of_different_images_with_their_labels():
    data = numbered(10)
    loader = TensorLoader(data, 4, seed=0)
    batches = list(loader)
    assert len(loader) == len(batches) == 2
    seen = torch.cat([labels for _, labels in batches])
    assert len(seen) == 8 and len(seen.unique()) == 8
    for images, labels in batches:
        assert torch.equal(images, data.images[labels])


def test_orders_run_on_across_passes_so_that_every_image_is_seen_equally_often():
    loader = TensorLoader(numbered(10), 4, seed=0, batches=3)  # five passes of 3 * 4 are six orders of 10
    seen = torch.cat([labels for _ in range(5) for _, labels in loader])
    assert seen.bincount().tolist() == [6] * 10
    for order in seen.split(10):
        assert len(order.unique()) == 10


def test_each_pass_is_shuffled_anew_and_a_seed_repeats_them():
    passes = [[labels.tolist() for _, labels in loader] for loader in [TensorLoader(numbered(20), 10, seed=3)] * 2]
    assert passes[0] != passes[1]
    again = TensorLoader(numbered(20), 10, seed=3)
    torch.manual_seed(99)  # the global generator has no part in it
    assert [[labels.tolist() for _, labels in again] for _ in range(2)] == passes
    other = TensorLoader(numbered(20), 10, seed=4)
    assert [labels.tolist() for _, labels in other] != passes[0]


def test_shift_moves_by_at_most_its_pixels_and_fills_with_the_background():
    data = numbered(200)
    seen = set()
    for images, labels in TensorLoader(data, 50, seed=0, shift=1, background=-5.0):
        assert images.is_contiguous() and images.shape == (50, 1, 4, 4)
        for image, original in zip(images[:, 0], data.images[labels][:, 0], strict=True):
            # Every way of moving the original by up to one pixel; exactly one of them is the image.
            moved = {}
            for down in (-1, 0, 1):
                for right in (-1, 0, 1):
                    target = torch.full((4, 4), -5.0)
                    rows, columns = slice(max(down, 0), 4 + min(down, 0)), slice(max(right, 0), 4 + min(right, 0))
                    from_rows = slice(max(-down, 0), 4 + min(-down, 0))
                    from_columns = slice(max(-right, 0), 4 + min(-right, 0))
                    target[rows, columns] = original[from_rows, from_columns]
                    moved[down, right] = target
            matches = [shift for shift, target in moved.items() if torch.equal(target, image)]
            assert len(matches) == 1
            seen.update(matches)
    assert len(seen) == 9


def test_shift_moves_all_channels_together():
    images = torch.randn(8, 1, 5, 6).expand(8, 3, 5, 6).contiguous()
    ((batch, _),) = TensorLoader(ImageSet(images, torch.arange(8)), 8, seed=1, shift=2)
    assert torch.equal(batch[:, 0], batch[:, 1]) and torch.equal(batch[:, 0], batch[:, 2])
    assert not torch.equal(batch.sort(0).values, images.sort(0).values)


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batch_larger_than_the_set_is_one_sentence(batch_size):
    with pytest.raises(ValueError, match=r"batch_size must be in \[1, 10\], the images there are, got"):
        TensorLoader(numbered(10), batch_size, seed=0)


def test_split_is_disjoint_balanced_and_repeats():
    data = ImageSet(torch.arange(30.0).reshape(30, 1, 1, 1), torch.arange(30) % 3)
    kept, held = data.split(0.2, seed=5)
    assert kept.labels.bincount().tolist() == [8, 8, 8] and held.labels.bincount().tolist() == [2, 2, 2]
    both = torch.cat([kept.images, held.images]).flatten()
    assert both.sort().values.tolist() == list(range(30))
    assert torch.equal(data.split(0.2, seed=5)[1].images, held.images)
    assert not torch.equal(data.split(0.2, seed=6)[1].images, held.images)


def test_split_holds_out_and_keeps_at_least_one_of_each_class():
    data = ImageSet(torch.zeros(4, 1, 1, 1), torch.tensor([0, 0, 1, 1]))
    for fraction in (0.01, 0.99):
        kept, held = data.split(fraction, seed=0)
        assert sorted(kept.labels.tolist()) == sorted(held.labels.tolist()) == [0, 1]

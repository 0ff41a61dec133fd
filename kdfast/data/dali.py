"""The DALI back end: decoding and every augmentation in one pipeline, on the GPU if there is one, else on CPU threads.

The pipeline draws nothing itself: it is fed encoded (or resident) images and the numbers of `Draws`, so that it does
what the other back ends do, and a batch depends on nothing that went before it.
"""

import importlib.util
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from kdfast.data.augment import BINS, LAYERS
from kdfast.data.engines import Request, Work
from kdfast.data.files import Files, decoded, inner_boxes, size_of
from kdfast.data.vision import OPERATIONS

INSTALL = "pip install nvidia-dali-cuda120 (or -cuda130, after CUDA's version)"


def available() -> bool:
    """Whether DALI is installed; it is not imported to find out."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


class Dali:
    """A pipeline that is kept from epoch to epoch; a new one after an image that it could not decode.

    Raises:
        ImportError: without DALI, naming the command that installs it.
        ValueError: for augmentations that need three channels, on others.
    """

    def __init__(self, work: Work):
        if not available():
            raise ImportError(f"The loader 'dali' needs NVIDIA DALI, which is not installed; run: {INSTALL}.")
        colored = [name for name in ("color", "randaugment") if getattr(work.augment, name)]
        if colored and work.shape[0] != 3:
            raise ValueError(f"augment's {colored[0]} needs images of 3 channels, got {work.shape[0]}; leave it out.")
        self.work, self._pipeline = work, None

    def batches(self, requests: Iterable[Request]) -> Iterator[tuple[Tensor, np.ndarray]]:
        for request in requests:
            while True:
                feed, samples = self._feed(request)
                if self._pipeline is None:
                    self._pipeline = _built(self.work)
                try:
                    (output,) = self._pipeline.run(**feed)
                    break
                except RuntimeError as error:
                    self._pipeline = None  # unusable from here on
                    self._mark_broken(samples, error)
            yield self._tensor(output, len(samples)), samples

    def _tensor(self, output, count: int) -> Tensor:
        return torch.from_dlpack(output.as_tensor())

    def _mark_broken(self, samples: np.ndarray, error: RuntimeError) -> None:
        """Find what the pipeline could not decode, which it does not say."""
        found = False
        for sample in samples.tolist() if isinstance(self.work.data, Files) else ():
            try:
                decoded(self.work.data.read(sample))
            except OSError as reason:
                self.work.data.mark(sample, str(reason))
                found = True
        if not found:
            raise error

    def _feed(self, request: Request) -> tuple[dict[str, list[np.ndarray]], np.ndarray]:
        """Every input of the pipeline by its name, an array an image; and the images that are in it."""
        work, augment = self.work, self.work.augment
        samples, count, size = request.samples, len(request.samples), self.work.shape[1]
        feed: dict[str, Iterable] = {}
        if isinstance(work.data, Files):
            contents, samples, sizes = self._read(samples)
            feed["encoded"] = [np.frombuffer(content, np.uint8) for content in contents]
        else:
            pictures = work.data.images[torch.from_numpy(samples)].permute(0, 2, 3, 1)
            feed["pixels"] = list(pictures.contiguous().numpy())
        draws = request._replace(samples=samples).draws()  # of those that are there, as what is cached of an image
        if _resizes(work) and augment.crop:
            boxes = draws.boxes(*sizes.T).astype(np.int32)
            feed["start"], feed["extent"] = boxes[:, :2], boxes[:, 2:]
        elif _resizes(work):
            scaled, corner = inner_boxes(*sizes.T, size)
            feed["scaled"], feed["corner"] = scaled.astype(np.float32), corner.astype(np.int32)
        elif augment.crop:
            feed["corner"] = (np.stack(draws.offsets(work.shift), 1) - work.shift).astype(np.int32)
        if augment.flip:
            feed["flip"] = draws.flips().astype(np.int32)
        if augment.color:
            for name, factors in zip(
                ("brightness", "contrast", "saturation"), draws.colors(augment.color).T, strict=True
            ):
                feed[name] = factors
        if augment.randaugment:
            chosen, turned = (x.astype(np.int32) for x in draws.operations(len(OPERATIONS)))
            for layer in range(LAYERS):
                feed[f"operation{layer}"], feed[f"turned{layer}"] = chosen[:, layer], turned[:, layer]
        if augment.cutout:
            squares = draws.squares(augment.cutout, *work.shape[1:]).astype(np.float32)
            feed["square"], feed["side"] = squares[:, :2], squares[:, 2:] - squares[:, :2]
        if request.mix is not None:
            feed["before"] = np.roll(np.arange(count, dtype=np.int32), 1)
            box = request.mix.box or (0, 0, *work.shape[1:])
            share = 1.0 if request.mix.box else 1 - request.mix.share
            feed["others"] = np.full(count, share, np.float32)
            if augment.cutmix:
                box = np.tile(np.array(box, np.float32), (count, 1))
                feed["patch"], feed["patch_size"] = box[:, :2], box[:, 2:]
        return {name: list(np.asarray(x)) if isinstance(x, np.ndarray) else x for name, x in feed.items()}, samples

    def _read(self, wanted: np.ndarray) -> tuple[list[bytes], np.ndarray, np.ndarray]:
        """Files' contents, the images they are of, and their sizes [batch, 2], which are in their heads."""
        data, members = self.work.data, self.work.members
        while True:
            samples = data.readable(wanted, members)
            contents, sizes = [], []
            for sample in samples.tolist():
                try:
                    content = data.read(sample)
                    sizes.append(size_of(content))
                    contents.append(content)
                except OSError as error:
                    data.mark(sample, str(error))
            if len(contents) == len(samples):
                return contents, samples, np.array(sizes)


def _resizes(work: Work) -> bool:
    return isinstance(work.data, Files) and work.data.resize


def _built(work: Work):
    from nvidia.dali import fn, pipeline_def, types

    gpu = work.device.type == "cuda"
    placed = "gpu" if gpu else "cpu"
    height, width = work.shape[1:]
    augment = work.augment

    def number(name: str, dtype=types.FLOAT, dims: int = 0, device: str = "cpu"):
        return fn.external_source(name=name, dtype=dtype, ndim=dims, device=device)

    def loaded():
        if not isinstance(work.data, Files):
            dtype = types.UINT8 if work.data.images.dtype == torch.uint8 else types.FLOAT
            return fn.external_source(name="pixels", dtype=dtype, ndim=3, layout="HWC", device=placed)
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        options = {"device": "mixed" if gpu else "cpu", "output_type": types.RGB, "adjust_orientation": False}
        if not (_resizes(work) and augment.crop):
            return fn.decoders.image(encoded, **options)
        # Only the part that is wanted is decoded.
        start, extent = number("start", types.INT32, 1), number("extent", types.INT32, 1)
        return fn.decoders.image_slice(encoded, start=start, shape=extent, axes=[0, 1], **options)

    def cropped(images):
        linear = {"interp_type": types.INTERP_LINEAR, "antialias": True}
        if _resizes(work) and augment.crop:
            return fn.resize(images, size=[height, width], **linear)
        if _resizes(work):
            images = fn.resize(images, size=number("scaled", dims=1), **linear)
        elif not augment.crop:
            return images
        corner = number("corner", types.INT32, 1)
        outside = {"out_of_bounds_policy": "pad", "fill_values": 0}
        return fn.slice(images, start=corner, shape=[height, width], axes=[0, 1], **outside)

    def colored(images):
        images = fn.brightness(images, brightness=number("brightness"))
        # Contrast is away from the mean of the grey image, as torchvision's is.
        grey = types.Constant(np.array([0.299, 0.587, 0.114], np.float32))
        mean = fn.reductions.mean(images, axis_names="HW", keep_dims=True)
        centre = fn.reductions.sum(mean * grey, axis_names="C", keep_dims=True)
        factor = number("contrast", device=placed)
        images = fn.cast_like(centre + (images - centre) * factor, images)
        return fn.saturation(images, saturation=number("saturation"))

    def operated(images, layer: int):
        from nvidia.dali.auto_aug.core import select, signed_bin

        bins = signed_bin(round(augment.randaugment), random_sign=number(f"turned{layer}", types.INT32))
        chosen = number(f"operation{layer}", types.INT32)
        return select(
            _operations(), chosen, images, magnitude_bin=bins, num_magnitude_bins=BINS, shape=[height, width],
            fill_value=0, interp_type=types.INTERP_NN,
        )  # fmt: skip

    def mixed(images):
        others = fn.permute_batch(images, indices=number("before", types.INT32))
        share = number("others", device=placed)
        if augment.cutmix:
            ones = fn.constant(fdata=1.0, shape=[1, height, width], layout="CHW", device=placed)
            patch = {"anchor": number("patch", dims=1), "shape": number("patch_size", dims=1)}
            share = share * (1.0 - fn.erase(ones, axis_names="HW", fill_value=0.0, **patch))
        return images + (others - images) * share

    @pipeline_def(enable_conditionals=bool(augment.randaugment))
    def pipeline():
        images = cropped(loaded())
        flips = number("flip", types.INT32) if augment.flip else 0
        if augment.randaugment or augment.color:
            images = fn.flip(images, horizontal=flips)
            flips = 0
        if augment.color:
            images = colored(images)
        if augment.randaugment:
            for layer in range(LAYERS):
                images = operated(images, layer)
        images = fn.crop_mirror_normalize(
            images, dtype=types.FLOAT, output_layout="CHW", mirror=flips,
            mean=work.mean.flatten().tolist(), std=work.deviation.flatten().tolist(),
        )  # fmt: skip
        if augment.cutout:
            square = {"anchor": number("square", dims=1), "shape": number("side", dims=1)}
            images = fn.erase(images, axis_names="HW", fill_value=0.0, **square)
        return mixed(images) if augment.mixes else images

    built = pipeline(
        batch_size=work.batch_size,
        num_threads=work.workers or 1,
        device_id=(work.device.index or 0) if gpu else None,
        prefetch_queue_depth=1,  # a stream runs it ahead of the training in a thread
        exec_dynamic=True,  # what it gives is then the taker's: no copy is needed
    )
    built.build()
    return built


def _operations() -> list:
    """RandAugment's in the order of `OPERATIONS`, with torchvision's ranges."""
    from nvidia.dali import fn
    from nvidia.dali.auto_aug import augmentations as a
    from nvidia.dali.auto_aug.core import augmentation

    # DALI's own versions of two call these by their former names, and are warned.
    operators = fn if hasattr(fn, "equalize") else fn.experimental

    @augmentation(mag_range=(0, 0.9), randomly_negate=True, mag_to_param=a.sharpness_kernel, param_device="auto")
    def sharpness(data, kernel):
        return operators.filter(data, kernel)

    @augmentation
    def equalize(data, _):
        return operators.equalize(data)

    factor = {"mag_range": (0, 0.9), "randomly_negate": True}
    shift = {"mag_range": (0, 150 / 331), "randomly_negate": True}
    changed = {
        "shear_x": a.shear_x.augmentation((0, 0.3), True),
        "shear_y": a.shear_y.augmentation((0, 0.3), True),
        "translate_x": a.translate_x.augmentation(**shift),
        "translate_y": a.translate_y.augmentation(**shift),
        "rotate": a.rotate.augmentation((0, 30), True),
        "brightness": a.brightness.augmentation(**factor, mag_to_param=a.shift_enhance_range),
        "color": a.color.augmentation(**factor, mag_to_param=a.shift_enhance_range),
        "contrast": a.contrast.augmentation(**factor, mag_to_param=a.shift_enhance_range),
        "sharpness": sharpness,
        "equalize": equalize,
        "posterize": a.posterize.augmentation((8, 4), False, a.poster_mask_uint8),
        "solarize": a.solarize.augmentation((256, 0)),
    }
    return [changed[name] if name in changed else getattr(a, name) for name in OPERATIONS]

"""Turns a dataset's images into model inputs; each is decoded once as long as all fit in memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedConfig, ViTImageProcessorPil
from transformers.image_processing_backends import PilBackend

from fastln.errors import FastLNError, loading
from fastln.models.image_size import check_size_for
from fastln.models.threads import in_threads

if TYPE_CHECKING:
    from PIL import Image

    from fastln.data import VQADataset
    from fastln.data.images import ImageStat

CACHE_BYTES = 1 << 30

_PIPELINE = ("__call__", "preprocess", "_preprocess_image_like_inputs", "process_image", "_preprocess", "resize")
"""The methods of transformers' processors on Pillow that an image passes before and while it is resized."""


class ImageInputs:
    """The output of a transformers image processor, cached while it fits in memory.

    Args:
        processor: the image processor.
        dtype: dtype of the pixel values, cached and returned.
        cache_bytes: how much memory the cache may take; beyond that, images are decoded again.
    """

    def __init__(self, processor: Any, dtype: torch.dtype, cache_bytes: int = CACHE_BYTES) -> None:
        self.processor = processor
        self.dtype = dtype
        self._room = cache_bytes
        self._kept: dict[tuple[str, str], dict[str, Tensor]] = {}

    def inputs(self, dataset: VQADataset, keys: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return each image as the model's keyword arguments; their rows are concatenated with those of other images.

        Images that are not cached are decoded and processed on several threads; see `in_threads`. Those that a program
        draws are not, since Python's lock lets one thread draw at a time; nor those for processors that are not
        transformers' own for Pillow: torchvision's use torch's threads.

        Args:
            dataset: has the images.
            keys: an image each, repeated ones too.

        Raises:
            FastLNError: if an image cannot be read; of several, the first is named.
        """
        made = {key: self._kept[dataset.name, key] for key in keys if (dataset.name, key) in self._kept}
        missing = [key for key in dict.fromkeys(keys) if key not in made]
        process = functools.partial(self._process, dataset)
        if isinstance(self.processor, PilBackend) and not dataset.synthetic:
            processed = in_threads(process, missing)
        else:
            processed = [process(key) for key in missing]
        for key, one in zip(missing, processed, strict=True):
            # Not on those threads, because each would start a team of torch's threads.
            one["pixel_values"] = one["pixel_values"].to(self.dtype)
            made[key] = one
            size = sum(tensor.nbytes for tensor in one.values())
            if size <= self._room:
                self._room -= size
                self._kept[dataset.name, key] = one
        return [made[key] for key in keys]

    def _process(self, dataset: VQADataset, key: str) -> dict[str, Tensor]:
        """Decode and process one image; on any thread."""
        return dict(self.processor(self._image(dataset, key), return_tensors="pt"))

    def _image(self, dataset: VQADataset, key: str) -> Image.Image:
        return dataset.image(key)

    def shape(self, stat: ImageStat) -> torch.Size:
        """Return the shape of an image's `pixel_values`, without decoding it; here (n_patches, values per patch).

        A quarter turn does not change it, so it does not matter that `stat` ignores the stored orientation.

        Raises:
            FastLNError: if the processor takes no images of this size.
        """
        processor = self.processor
        try:
            n_patches = processor.get_number_of_image_patches(stat.height, stat.width)
        except ValueError as error:
            raise FastLNError(f"an image of {stat.width} x {stat.height} pixels: {error}") from None
        return torch.Size((n_patches, 3 * processor.temporal_patch_size * processor.patch_size**2))

    def __str__(self) -> str:
        """The size of the images that the model gets; here the processor's limits on their pixels."""
        return f"{self.processor.size['shortest_edge']:,} to {self.processor.size['longest_edge']:,} pixels each"


class ImagePixels(ImageInputs):
    """Resizes and normalises images for a vision encoder of one image size.

    Every image is resized in full to a square. Nothing is cropped, because radiographs also have findings at the edges.

    Args:
        processor: a transformers image processor; its size and cropping are overridden.
        image_size: edge length in pixels; by default the processor's.
        dtype: as in `ImageInputs`.
        cache_bytes: as in `ImageInputs`.
    """

    def __init__(
        self, processor: Any, image_size: int | None, dtype: torch.dtype, cache_bytes: int = CACHE_BYTES
    ) -> None:
        edge = image_size or _edge(processor)
        processor.do_resize = True
        processor.size = {"height": edge, "width": edge}
        processor.do_center_crop = False
        super().__init__(processor, dtype, cache_bytes)
        self.image_size = edge

    @classmethod
    def of_source(
        cls, source: str | None, config: PreTrainedConfig, dtype: torch.dtype, image_size: int | None = None
    ) -> ImagePixels:
        """Load a model's preprocessing; if it has none, use plain preprocessing with the size in its configuration.

        Args:
            source: a directory or hub name; None if there is only the configuration.
            config: configuration of the vision encoder.
            dtype: dtype of the pixel values.
            image_size: edge length in pixels; by default that of the preprocessing.

        Raises:
            FastLNError: if the preprocessing cannot be loaded, or the encoder cannot cut such images into patches.
        """
        check_size_for(config, image_size)
        names = ("preprocessor_config.json", "processor_config.json")
        if source is None or (Path(source).is_dir() and not any((Path(source) / name).is_file() for name in names)):
            return cls.plain(image_size or config.image_size, dtype)
        with loading(source):
            processor = AutoImageProcessor.from_pretrained(source)
        return cls(processor, image_size, dtype)

    @classmethod
    def plain(cls, image_size: int, dtype: torch.dtype) -> ImagePixels:
        """Resize to `image_size` and map [0, 255] to [-1, 1]."""
        return cls(ViTImageProcessorPil(), image_size, dtype)

    def __call__(self, dataset: VQADataset, keys: Sequence[str]) -> Tensor:
        """Return the pixel values of images, (n_images, 3, image_size, image_size)."""
        return torch.stack([one["pixel_values"][0] for one in self.inputs(dataset, keys)])

    def _image(self, dataset: VQADataset, key: str) -> Image.Image:
        image = dataset.image(key)
        if _resizes_first(self.processor) and image.mode == "RGB" and not image.has_transparency_data:
            # The processor would turn the whole image into an array and back, and then call the same function.
            image = image.resize((self.image_size, self.image_size), self.processor.resample)
        return image

    def shape(self, stat: ImageStat | None = None) -> torch.Size:
        """Return the shape of an image's `pixel_values`; all images have the same."""
        return torch.Size((1, 3, self.image_size, self.image_size))

    def __str__(self) -> str:
        """The size of the images that the model gets."""
        return f"{self.image_size} x {self.image_size} pixels"


def _resizes_first(processor: Any) -> bool:
    """Whether a processor begins with Pillow's resizing of the whole image, as transformers' code for Pillow does."""
    own = all(getattr(type(processor), name, None) is getattr(PilBackend, name) for name in _PIPELINE)
    return own and processor.do_resize and isinstance(processor.resample, int)


def _edge(processor: Any) -> int:
    size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = size or processor.size
    for field in ("height", "shortest_edge", "longest_edge"):
        value = size.get(field) if isinstance(size, dict) else getattr(size, field, None)
        if value:
            return int(value)
    return 224

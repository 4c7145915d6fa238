"""Turns a dataset's images into model inputs; each is decoded once as long as all fit in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedConfig, ViTImageProcessorPil

from fastln.errors import FastLNError, loading
from fastln.models.image_size import check_size_for

if TYPE_CHECKING:
    from fastln.data import VQADataset
    from fastln.data.images import ImageStat

CACHE_BYTES = 1 << 30


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

    def inputs(self, dataset: VQADataset, key: str) -> dict[str, Tensor]:
        """Return one image as the model's keyword arguments; their rows are concatenated with those of other images."""
        name = (dataset.name, key)
        made = self._kept.get(name)
        if made is None:
            made = dict(self.processor(dataset.image(key), return_tensors="pt"))
            made["pixel_values"] = made["pixel_values"].to(self.dtype)
            size = sum(tensor.nbytes for tensor in made.values())
            if size <= self._room:
                self._room -= size
                self._kept[name] = made
        return made

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

    def __call__(self, dataset: VQADataset, key: str) -> Tensor:
        """Return one image's pixel values, (3, image_size, image_size)."""
        return self.inputs(dataset, key)["pixel_values"][0]

    def shape(self, stat: ImageStat | None = None) -> torch.Size:
        """Return the shape of an image's `pixel_values`; all images have the same."""
        return torch.Size((1, 3, self.image_size, self.image_size))

    def __str__(self) -> str:
        """The size of the images that the model gets."""
        return f"{self.image_size} x {self.image_size} pixels"


def _edge(processor: Any) -> int:
    size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = size or processor.size
    for field in ("height", "shortest_edge", "longest_edge"):
        value = size.get(field) if isinstance(size, dict) else getattr(size, field, None)
        if value:
            return int(value)
    return 224

"""From a dataset's images to pixel values, each decoded once while it fits in memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedConfig, ViTImageProcessorPil

from fastln.models.sources import loading

if TYPE_CHECKING:
    from fastln.data import VQADataset

CACHE_BYTES = 1 << 30


class ImagePixels:
    """Resizes and normalises images as a vision encoder wants them, and keeps the results.

    Every image is resized to the whole of a square: radiographs carry their findings at the edges too, so nothing is
    cropped away.

    Args:
        processor: a transformers image processor; its size and cropping are overruled.
        image_size: edge length in pixels; what the processor says by default.
        dtype: what the pixel values are kept and returned in.
        cache_bytes: how much memory the kept pixel values may take; past that, images are decoded again.
    """

    def __init__(
        self, processor: Any, image_size: int | None, dtype: torch.dtype, cache_bytes: int = CACHE_BYTES
    ) -> None:
        edge = image_size or _edge(processor)
        processor.do_resize = True
        processor.size = {"height": edge, "width": edge}
        processor.do_center_crop = False
        self.processor = processor
        self.image_size = edge
        self.dtype = dtype
        self._room = cache_bytes // (3 * edge * edge * dtype.itemsize)
        self._kept: dict[tuple[str, str], Tensor] = {}

    @classmethod
    def of_directory(
        cls, directory: str, config: PreTrainedConfig, dtype: torch.dtype, image_size: int | None = None
    ) -> ImagePixels:
        """Read the preprocessing beside a model; where there is none, plain, to the size in its configuration.

        Args:
            directory: a directory or hub name.
            config: of the vision encoder.
            dtype: of the pixel values.
            image_size: edge length in pixels; what the preprocessing says by default.
        """
        if Path(directory).is_dir() and not (Path(directory) / "preprocessor_config.json").is_file():
            return cls.plain(image_size or config.image_size, dtype)
        with loading(directory):
            processor = AutoImageProcessor.from_pretrained(directory)
        return cls(processor, image_size, dtype)

    @classmethod
    def plain(cls, image_size: int, dtype: torch.dtype) -> ImagePixels:
        """Resize to `image_size` and map [0, 255] to [-1, 1]."""
        return cls(ViTImageProcessorPil(), image_size, dtype)

    def __call__(self, dataset: VQADataset, key: str) -> Tensor:
        """Return one image's pixel values, (3, image_size, image_size)."""
        name = (dataset.name, key)
        pixels = self._kept.get(name)
        if pixels is None:
            image = dataset.image(key)
            pixels = self.processor(image, return_tensors="pt")["pixel_values"][0].to(self.dtype)
            if len(self._kept) < self._room:
                self._kept[name] = pixels
        return pixels


def _edge(processor: Any) -> int:
    size = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = size or processor.size
    for field in ("height", "shortest_edge", "longest_edge"):
        value = size.get(field) if isinstance(size, dict) else getattr(size, field, None)
        if value:
            return int(value)
    return 224

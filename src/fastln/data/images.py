"""Decodes image files to RGB: safely, and without losing values stored in more than 8 bits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastln.data import dicom
from fastln.errors import FastLNError

MAX_PIXELS = 1 << 26
"""The most pixels of an image that is decoded, 8192 x 8192. Pillow's own limit is higher, and Pillow only warns."""

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are decoded, by content, not by name. For others, such as EPS, Pillow runs other programs."""

_JPEG_END = b"\xff\xd9"


class ImageStat(NamedTuple):
    """What is known about an image before it is decoded.

    Attributes:
        width: In pixels, before an orientation stored with it is applied.
        height: As `width`.
        n_bytes: Size of its file or embedded content; 0 if a program draws it.
    """

    width: int
    height: int
    n_bytes: int


def read_image(source: Path | bytes, name: object = None) -> Image.Image:
    """Decode an image.

    Transparent pixels become black, the background of radiology. An orientation stored with a JPEG is applied. An
    animation or a stack of slices gives its first image. Grey values of more than 8 bits are scaled linearly: white is
    the largest value with as many bits as the brightest pixel needs (scanners store 10 or 12 bits in 16). If there are
    negative values, the lowest one becomes black. DICOM is windowed; see `fastln.data.dicom`.

    Args:
        source: The file, or its content.
        name: Its name in messages; the file's path by default.

    Returns:
        The image in mode RGB, 8 bits a channel.

    Raises:
        FastLNError: The file is missing or truncated, is not an image, has pixels without a known grey scale, or has
            more than `MAX_PIXELS` pixels. The message names it.
    """
    with _told(name or source):
        if dicom.is_dicom(source):
            return dicom.read(source, MAX_PIXELS)
        with _opened(source) as image:
            return _to_rgb(ImageOps.exif_transpose(image))


def check_image(source: Path | bytes, name: object = None) -> ImageStat:
    """Check, at low cost, that `read_image` can read an image: JPEG by its header and end, PNG by its checksums.

    A JPEG that does not end with its end marker, which cannot occur inside the pixels, is decoded at an eighth of its
    size.

    Returns:
        What the check found out about it.

    Raises:
        FastLNError: As in `read_image`.
    """
    with _told(name or source):
        n_bytes = len(source) if isinstance(source, bytes) else source.stat().st_size
        if dicom.is_dicom(source):
            return ImageStat(*dicom.read(source, MAX_PIXELS).size, n_bytes)
        with _opened(source) as image:
            stat = ImageStat(*image.size, n_bytes)
            if image.format == "PNG":
                image.verify()
                return stat
            if image.format == "JPEG":
                if _last_bytes(source, len(_JPEG_END)) == _JPEG_END:
                    return stat
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
            return stat


def _last_bytes(source: Path | bytes, count: int) -> bytes:
    if isinstance(source, bytes):
        return source[-count:]
    with source.open("rb") as file:
        file.seek(-count, os.SEEK_END)
        return file.read()


@contextmanager
def _told(name: object) -> Iterator[None]:
    """Turn every error about an image into a FastLNError that names it."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise FastLNError(f"{name}: this is not an image of a known format ({', '.join(FORMATS)}, DICOM)") from error
    except Exception as error:  # decoders raise almost anything on a damaged file
        raise FastLNError(f"{name}: cannot read this image: {error}") from error


@contextmanager
def _opened(source: Path | bytes) -> Iterator[Image.Image]:
    with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than the {MAX_PIXELS} that are decoded")
        if image.mode == "F":
            raise ValueError("floating-point pixels, whose black and white are not known")
        yield image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        values -= min(0, int(values.min()))
        white = (1 << max(8, int(values.max()).bit_length())) - 1
        image = Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image.convert("RGB")

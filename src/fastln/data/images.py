"""Image files to RGB: safely, and without losing what is stored in more than 8 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastln.errors import FastLNError

MAX_PIXELS = 1 << 26
"""The largest image that is decoded, 8192 x 8192; below Pillow's own limit, at which it would only warn."""

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, whatever a file is called: Pillow would hand others, such as EPS, to programs outside."""


def read_image(path: Path) -> Image.Image:
    """Decode an image file.

    Transparent pixels become black, the background of radiology; an orientation stored with a JPEG is applied. Grey
    values of more than 8 bits are scaled linearly: full white is the largest number of as many bits as the brightest
    pixel needs (scanners put 10 or 12 bits into 16); where there are negative values, the lowest one becomes black.

    Args:
        path: The file.

    Returns:
        The image in mode RGB, 8 bits a channel.

    Raises:
        FastLNError: The file is missing, truncated, no image, of a kind that has no grey scale, or holds more than
            `MAX_PIXELS` pixels. The message names it.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than the {MAX_PIXELS} that are decoded")
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise FastLNError(f"{path}: this is no image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow's decoders raise almost anything on a damaged file
        raise FastLNError(f"{path}: cannot read this image: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose black and white are not known")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        values -= min(0, int(values.min()))
        white = (1 << max(8, int(values.max()).bit_length())) - 1
        image = Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image.convert("RGB")

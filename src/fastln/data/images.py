"""Decodes image files to RGB: safely, and without losing values stored in more than 8 bits."""

from __future__ import annotations

import os
import re
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image, ImageOps, UnidentifiedImageError

from fastln.data import deep, dicom
from fastln.data.remarks import Remark, Remarks
from fastln.data.unreadable import kind_of
from fastln.errors import FastLNError

T = TypeVar("T")

MAX_PIXELS = 1 << 26
"""The most pixels of an image that is decoded, 8192 x 8192. Pillow's own limit is higher, and Pillow only warns."""

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""The formats that are decoded, by content, not by name. For others, such as EPS, Pillow runs other programs."""

SEVERAL = "hold several pictures, of which the first is used"
FEW_LEVELS = "fill few of 256 grey levels"

_TOO_MANY = f"more than the {MAX_PIXELS} that are decoded; scale it down"
_JPEG_END = b"\xff\xd9"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_ORIENTATION = 0x0112
_WARNING_FILTERS = threading.Lock()


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


def read_image(source: Path | bytes, name: object = None, frame: int | None = None) -> Image.Image:
    """Decode an image.

    Transparent pixels become black, the background of radiology. An orientation stored with the image is applied, and
    so is the gamma that a PNG states, unless it is the usual one. Colour profiles are ignored. Values of more than 8
    bits get the limits of `fastln.data.grey`. DICOM is windowed; see `fastln.data.dicom`. Several threads may call this
    at once.

    Args:
        source: The file, or its content.
        name: Its name in messages; the file's path by default.
        frame: Which picture, counted from 0, of an animation or a stack of slices; None for the first.

    Returns:
        The image in mode RGB, 8 bits a channel.

    Raises:
        FastLNError: The file is missing or truncated, is not an image, has no such frame, or has more than
            `MAX_PIXELS` pixels. The message names it.
    """
    with _told(source, name or source):
        if dicom.is_dicom(source):
            return dicom.read(source, MAX_PIXELS, frame or 0).image
        return _with_long_texts_dropped(source, lambda data: _decode(data, frame or 0)[0])


def check_image(
    source: Path | bytes, name: object = None, frame: int | None = None, remarks: Remarks | None = None
) -> ImageStat:
    """Check, at low cost, that `read_image` can read an image: JPEG by its header and end, PNG by its checksums.

    A JPEG that does not end with its end marker, which cannot occur inside the pixels, is decoded at an eighth of its
    size. Images of more than 8 bits and DICOM are decoded.

    Args:
        source: As in `read_image`.
        name: As in `read_image`.
        frame: As in `read_image`; with None, an image that holds several is remarked on.
        remarks: Takes what there is to say about the image.

    Returns:
        What the check found out about it.

    Raises:
        FastLNError: As in `read_image`.
    """
    name = name or source
    remarks = Remarks() if remarks is None else remarks
    with _told(source, name):
        n_bytes = len(source) if isinstance(source, bytes) else source.stat().st_size
        if dicom.is_dicom(source):
            shown = dicom.read(source, MAX_PIXELS, frame or 0)
            size, n_frames, rule, lost = shown.image.size, shown.n_frames, shown.rule, shown.lost
            for remark in shown.remarks:
                remarks.add(name, remark)
        else:
            size, n_frames, rule, lost = _with_long_texts_dropped(source, lambda data: _check(data, frame or 0))
    if rule:
        remarks.add_rule(rule)
    if lost:
        remarks.add(name, Remark(FEW_LEVELS, lost))
    if n_frames > 1 and frame is None:
        way = "" if isinstance(source, bytes) else " (write NAME#2 for the third)"
        remarks.add(name, Remark(SEVERAL + way, f"{n_frames} pictures"))
    return ImageStat(*size, n_bytes)


def _check(source: Path | bytes, frame: int) -> tuple[tuple[int, int], int, str, str]:
    """Return an image's size, the number of its pictures, the rule of its brightness and what levels it lost."""
    with _opened(source, frame) as image:
        size, n_frames = image.size, getattr(image, "n_frames", 1)
        if deep.is_deep(image):
            decoded = _decode(source, frame)[1]
            return (size, n_frames, decoded.rule, decoded.lost) if decoded else (size, n_frames, "", "")
        if image.format == "PNG" and not frame:
            rule = deep.gamma_rule(deep.exponent(image)).removeprefix(", ")
            image.verify()
            return size, n_frames, rule, ""
        if image.format == "JPEG":
            if _last_bytes(source, len(_JPEG_END)) == _JPEG_END:
                return size, n_frames, "", ""
            image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()
        return size, n_frames, "", ""


def _decode(source: Path | bytes, frame: int) -> tuple[Image.Image, deep.Decoded | None]:
    with _opened(source, frame) as image:
        if deep.is_deep(image):
            with _opened(source, frame) as again:
                decoded = deep.decode(image, again)
            turned = decoded.image
            if (orientation := image.getexif().get(_ORIENTATION)) is not None:
                turned.getexif()[_ORIENTATION] = orientation
            return ImageOps.exif_transpose(turned), decoded
        power = deep.exponent(image)
        rgb = _to_rgb(ImageOps.exif_transpose(image), power)
        return rgb, None


def _to_rgb(image: Image.Image, power: float) -> Image.Image:
    """Return an image in mode RGB: the same object if it is that already, because Pillow would copy it."""
    mode = "RGBA" if image.has_transparency_data else "RGB"
    image = image if image.mode == mode else image.convert(mode)
    if power != 1:
        curve = [round(255 * (level / 255) ** power) for level in range(256)]
        image = image.point(curve * 3 + (list(range(256)) if image.mode == "RGBA" else []))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _told(source: Path | bytes, name: object) -> Iterator[None]:
    """Turn every error about an image into a FastLNError of one line that names it."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise FastLNError(f"{name}: {_not_identified(source)}") from error
    except Exception as error:  # decoders raise almost anything on a damaged file
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        if "truncated" in reason.lower():  # Pillow has several wordings
            reason = "it is truncated or damaged: copy or download it again"
        elif not isinstance(error, (ValueError, MemoryError)) and not getattr(error, "strerror", None):
            reason = f"it is damaged, or of a kind that is not read ({reason}): copy it again, or save it as PNG"
        raise FastLNError(f"{name}: cannot read this image: {reason}") from error


def _not_identified(source: Path | bytes) -> str:
    kind = kind_of(source)
    if kind is None:  # it begins as one of the formats
        return "cannot read this image: it is damaged, or of a kind that is not read: copy it again, or save it as PNG"
    known = f"this is not an image of a known format ({', '.join(FORMATS)}, DICOM)"
    return f"{known}; it is {kind}" if kind else known


@contextmanager
def _opened(source: Path | bytes, frame: int = 0) -> Iterator[Image.Image]:
    # Pillow warns of some sizes beyond our limit, and raises for others. Threads share the filters of warnings: if two
    # changed them at a time, one would put back those of the other.
    with _WARNING_FILTERS, warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            count = re.search(r"\d+", str(error))
            raise ValueError(f"{int(count[0]):,} pixels, {_TOO_MANY}" if count else str(error)) from error
    with image:
        if not image.width * image.height:
            raise ValueError(f"{image.width} x {image.height} pixels: there is nothing to see")
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, {_TOO_MANY}")
        if frame:
            if frame >= (n_frames := getattr(image, "n_frames", 1)):
                raise ValueError(f"there is no picture {frame} in it, counted from 0; it holds {n_frames}")
            image.seek(frame)
        yield image


def _last_bytes(source: Path | bytes, count: int) -> bytes:
    if isinstance(source, bytes):
        return source[-count:]
    with source.open("rb") as file:
        file.seek(-count, os.SEEK_END)
        return file.read()


def _with_long_texts_dropped(source: Path | bytes, function: Callable[[Path | bytes], T]) -> T:
    """Apply a function; if Pillow refuses a PNG for its long texts, which are no part of the picture, without them."""
    try:
        return function(source)
    except ValueError as error:
        if "MAX_TEXT" not in str(error):
            raise
    content = source if isinstance(source, bytes) else source.read_bytes()
    kept, start = [_PNG_START], len(_PNG_START)
    while start + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, start)
        end = start + 12 + length
        if kind not in _PNG_TEXTS:
            kept.append(content[start:end])
        start = end
    return function(b"".join(kept))

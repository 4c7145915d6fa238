"""Pixels of more than 8 bits in the formats that Pillow opens: PNG, TIFF, JPEG 2000, PGM and PPM.

Pillow keeps grey values whole, but of colours of 16 bits only the high bytes. A second pass decodes the low bytes: it
tells Pillow the wrong order of the two. Of a TIFF that stores colours of 16 bits one after the other, Pillow 13 reads
the bytes as if they were pixels, and signed or large unsigned integers as the other kind; both are put right here.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fastln.data import grey

_MIN_IS_WHITE = 0
_BITS, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 258, 262, 284, 339  # tags of TIFF
_UNSIGNED, _SIGNED = 1, 2
_APART = 2

_OTHER_BYTES = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA", "R", "G", "B", "A")
    for order, other in (("B", "L"), ("L", "B"), ("N", "L" if sys.byteorder == "big" else "B"))
}
_GREY_ALPHA = "LA;16B"


class Decoded(NamedTuple):
    """A deep image as 8 bits a channel.

    Attributes:
        image: In mode RGB, in the stored orientation.
        rule: How black and white were found.
        lost: Empty, or how few grey levels it fills.
    """

    image: Image.Image
    rule: str
    lost: str


def is_deep(image: Image.Image) -> bool:
    """Whether an image that is open but not loaded has more than 8 bits a channel that can be read."""
    return (
        image.mode.startswith(("I", "F"))
        or {*_raw_modes(image)} <= {*_OTHER_BYTES, _GREY_ALPHA}
        or (image.mode == "L" and _tag(image, _SAMPLE_FORMAT) == _SIGNED)
    )


def decode(image: Image.Image, again: Image.Image) -> Decoded:
    """Decode a deep image.

    Args:
        image: The image, not loaded.
        again: The same image, opened a second time.

    Raises:
        ValueError: No pixel is a finite number, or Pillow does not give the values in full.
    """
    transparent = image.info.get("transparency")
    raw = _raw_modes(image)
    gamma = exponent(image)
    if {*raw} <= {*_OTHER_BYTES}:
        if _tag(image, _PLANAR) == _APART and _is_compressed(image):
            raise ValueError(
                "compressed colours of 16 bits, one after the other, of which Pillow reads half; save it as PNG"
            )
        _set_raw_modes(image, raw)
        _set_raw_modes(again, [_OTHER_BYTES[mode] for mode in raw])
        values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(again)
        clear = (values[..., :3] == transparent).all(-1) if isinstance(transparent, tuple) else None
        opacity = _opacity(values[..., 3:], clear)
        if (values[..., :3] == values[..., :1]).all():  # grey stored as colour
            return _grey(values[..., 0], opacity, gamma, inverted=False)
        return _colour(values[..., :3], opacity, gamma)
    if raw == [_GREY_ALPHA]:
        _set_raw_modes(image, ["RGBA"])  # four bytes a pixel as well: the high and the low one of grey, then of alpha
        values = np.asarray(image).copy().view(">u2")
        return _grey(values[..., 0], _opacity(values[..., 1:], None), gamma, inverted=False)
    values = np.asarray(image)
    if values.dtype == np.uint8:
        values = values.view(np.int8)
    elif values.dtype == np.int32 and (_tag(image, _BITS), _tag(image, _SAMPLE_FORMAT)) == (32, _UNSIGNED):
        values = values.view(np.uint32)
    inverted = _tag(image, _PHOTOMETRIC) == _MIN_IS_WHITE
    clear = values == transparent if isinstance(transparent, int) else None
    return _grey(values, _opacity(values[..., None][..., 1:], clear), gamma, inverted=inverted)


def exponent(image: Image.Image) -> float:
    """Return the power that a PNG's stated gamma asks for; 1 if it states none, the usual one, or a colour profile."""
    gamma = image.info.get("gamma")
    if not gamma or "srgb" in image.info or "icc_profile" in image.info:
        return 1.0
    power = 1 / (2.2 * float(gamma))
    return power if abs(power - 1) > 0.05 else 1.0


def gamma_rule(power: float) -> str:
    """Return the words for the log about a gamma that was applied."""
    return "" if power == 1 else ", by the gamma stated in the file"


def _grey(values: np.ndarray, opacity: np.ndarray | None, power: float, *, inverted: bool) -> Decoded:
    counted = np.isfinite(values)
    if not counted.any():
        raise ValueError("no pixel is a finite number")
    if opacity is not None:
        counted &= opacity > 0
    limits = grey.robust_limits(values[counted])
    brightness = np.nan_to_num(limits.brightness(values))
    if inverted:
        brightness = 1 - brightness
        brightness[np.isnan(values)] = 0
    lost = grey.levels_lost(values[counted], brightness[counted])
    return Decoded(_finish(brightness, opacity, power), grey.ROBUST + gamma_rule(power), lost)


def _colour(values: np.ndarray, opacity: np.ndarray | None, power: float) -> Decoded:
    limits = grey.colour_limits(values)
    brightness = limits.brightness(values)
    rule = f"from 0 to {int(limits.white)} in colour{gamma_rule(power)}"
    lost = grey.levels_lost(values, brightness)
    return Decoded(_finish(brightness, None if opacity is None else opacity[..., None], power), rule, lost)


def _finish(brightness: np.ndarray, opacity: np.ndarray | None, power: float) -> Image.Image:
    if power != 1:
        brightness = brightness**power
    return grey.to_rgb(brightness if opacity is None else brightness * opacity)


def _opacity(alpha: np.ndarray, clear: np.ndarray | None) -> np.ndarray | None:
    """Return opacity from 0 to 1, (rows, columns), from a channel or from the clear pixels; None if all is opaque."""
    if alpha.shape[-1]:
        return alpha[..., 0].astype(np.float64) / 65535
    return None if clear is None or not clear.any() else 1.0 - clear


def _raw_modes(image: Any) -> list[str]:
    """Return the layout of the pixels in each part of the file, in Pillow's words."""
    tiles: list[Any] = getattr(image, "tile", [])
    modes = [str(tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args) for tile in tiles]
    if {*modes} <= {*"RGBA"} and _tag(image, _BITS) == 16:  # one colour after the other
        order = "L" if image.tag_v2.prefix == b"II" else "B"
        return [f"{mode};16{order}" for mode in modes]
    return modes or [""]


def _set_raw_modes(image: Any, modes: list[str]) -> None:
    image.tile = [
        tile._replace(args=(mode, *tile.args[1:]) if isinstance(tile.args, tuple) else mode)
        for tile, mode in zip(image.tile, modes, strict=True)
    ]


def _is_compressed(image: Any) -> bool:
    return any(tile.codec_name == "libtiff" for tile in image.tile)


def _tag(image: Image.Image, number: int) -> Any:
    """Return a tag of a TIFF file, the first of several values; None for other files."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) else value

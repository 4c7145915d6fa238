"""DICOM images to RGB, in the window that the file names.

The grey values of the first frame pass through the modality's rescaling and the file's first window (DICOM PS3.3
C.11.2.1.2, functions LINEAR, LINEAR_EXACT and SIGMOID) or table of values of interest. Without either, the lowest value
becomes black and the highest white; this also applies to enhanced files, which keep their windows per frame.
MONOCHROME1, in which low values are bright, is inverted.

pydicom reads the files (`pip install 'fastln[dicom]'`). Uncompressed and run-length encoded pixels need nothing else.
JPEG, JPEG-LS and JPEG 2000 need pydicom's plugins that decode them.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from pydicom import Dataset

_PREAMBLE = 128
_MARK = b"DICM"


def is_dicom(source: Path | bytes) -> bool:
    """Whether a file (or its content) has the DICOM mark after the preamble."""
    if isinstance(source, bytes):
        return source[_PREAMBLE : _PREAMBLE + len(_MARK)] == _MARK
    with source.open("rb") as file:
        return file.read(_PREAMBLE + len(_MARK))[_PREAMBLE:] == _MARK


def read(source: Path | bytes, max_pixels: int) -> Image.Image:
    """Decode the first frame.

    Args:
        source: The file, or its content.
        max_pixels: The most pixels of an image that is decoded.

    Returns:
        The image in mode RGB, 8 bits a channel.

    Raises:
        ValueError: pydicom is missing, or the image too large; pydicom raises more for files that it cannot decode.
    """
    try:
        from pydicom import dcmread
        from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
    except ImportError as error:
        raise ValueError("this is DICOM, for which pydicom is needed: pip install 'fastln[dicom]'") from error
    header = dcmread(_file(source), stop_before_pixels=True)
    rows, columns = int(header.get("Rows", 0)), int(header.get("Columns", 0))
    if rows * columns > max_pixels:
        raise ValueError(f"{columns} x {rows} pixels, more than the {max_pixels} that are decoded")
    pixels = pixel_array(_file(source), index=0)
    kind = header.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, header)
    if pixels.ndim == 3:
        return Image.fromarray((pixels >> 8 if pixels.dtype == np.uint16 else pixels).astype(np.uint8))
    grey = _window(apply_modality_lut(pixels, header), header)
    if kind == "MONOCHROME1":
        grey = 1 - grey
    return Image.fromarray(np.rint(grey * 255).astype(np.uint8)).convert("RGB")


def _window(values: np.ndarray, header: Dataset) -> np.ndarray:
    """Map modality values to brightness, from 0 to 1."""
    if "VOILUTSequence" in header and "WindowCenter" not in header:
        from pydicom.pixels import apply_voi

        _, _, bits = header.VOILUTSequence[0].LUTDescriptor
        return apply_voi(values.astype(np.int64), header) / ((1 << int(bits)) - 1)
    values = values.astype(np.float64)
    if header.get("WindowCenter") is None or header.get("WindowWidth") is None:
        low, high = values.min(), values.max()
        return (values - low) / max(high - low, 1)
    center, width = float(_first(header.WindowCenter)), float(_first(header.WindowWidth))
    function = header.get("VOILUTFunction", "LINEAR")
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if width <= 0:  # a window of one value: a threshold
        return (values > center).astype(np.float64)
    if function == "SIGMOID":
        # tanh, which cannot overflow: 1 / (1 + exp(-4x)) = (1 + tanh(2x)) / 2
        return (1 + np.tanh(2 * (values - center) / width)) / 2
    return np.clip((values - center) / width + 0.5, 0, 1)


def _first(value: Any) -> Any:
    return value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value


def _file(source: Path | bytes) -> Path | BytesIO:
    return BytesIO(source) if isinstance(source, bytes) else source

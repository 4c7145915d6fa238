"""DICOM images to RGB, as the file says that they are to be shown.

One frame passes through the modality's table or rescaling, then through the file's first table of values of interest
or, without one, its first window (DICOM PS3.3 C.11.2.1.2, functions LINEAR, LINEAR_EXACT and SIGMOID). Enhanced files
keep these per frame. Without either, pixels of up to 8 bits are shown as they are, and deeper ones in the limits of
`fastln.data.grey`. MONOCHROME1 and the presentation shape INVERSE, in which low values are bright, are inverted.
Padding is no picture: it is black and does not count for the limits. Overlays are not drawn.

pydicom reads the files (`pip install 'fastln[dicom]'`). Uncompressed and run-length encoded pixels need nothing else.
JPEG, JPEG-LS and JPEG 2000 need pydicom's plugins that decode them.
"""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from fastln.data import grey
from fastln.data.remarks import Remark

if TYPE_CHECKING:
    from pydicom import Dataset

SEVERAL_WINDOWS = "name several windows or tables, of which the first is used"

_PREAMBLE = 128
_MARK = b"DICM"
_BARE = re.compile(
    rb"(?s)(\x02\x00[\x00\x01\x02\x10\x12]|\x08\x00[\x00\x01\x05\x08\x12-\x18])\x00"
    rb"(UL|OB|UI|CS|SH|LO|DA|TM|[\x02-\x80]\x00\x00\x00)"
    rb"|\x00\x08\x00[\x00\x01\x05\x08\x12-\x18](UL|UI|CS|DA|TM)"
)
"""The beginning of a file without preamble: an element that may come first, with its type or a small length."""

_PER_FRAME = ("FrameVOILUTSequence", "PixelValueTransformationSequence")


class Shown(NamedTuple):
    """A frame as it is to be shown.

    Attributes:
        image: In mode RGB.
        n_frames: The frames in the file.
        rule: How black and white were found; empty for pixels of 8 bits as they are.
        lost: Empty, or how few grey levels it fills.
        remarks: What else there is to say.
    """

    image: Image.Image
    n_frames: int
    rule: str
    lost: str
    remarks: list[Remark]


def is_dicom(source: Path | bytes) -> bool:
    """Whether a file (or its content) has the DICOM mark after the preamble, or begins as DICOM without preamble."""
    start = _starts(source)
    return start[_PREAMBLE:] == _MARK or start.startswith(_MARK) or _BARE.match(start) is not None


def read(source: Path | bytes, max_pixels: int, frame: int = 0) -> Shown:
    """Decode a frame.

    Args:
        source: The file, or its content.
        max_pixels: The most pixels of an image that is decoded.
        frame: Which one, counted from 0.

    Raises:
        ValueError: pydicom or a decoder is missing, the file holds no pixels or no such frame, or they are too many;
            pydicom raises more for files that it cannot decode.
    """
    try:
        from pydicom import dcmread
    except ImportError as error:
        raise ValueError("this is DICOM, for which pydicom is needed: pip install 'fastln[dicom]'") from error
    if _starts(source).startswith(_MARK):  # the preamble is missing, and pydicom takes the mark for an element
        source = (source if isinstance(source, bytes) else source.read_bytes())[len(_MARK) :]
    header = dcmread(_file(source), stop_before_pixels=True, force=True)
    rows, columns, n_frames = (int(header.get(name) or 0) for name in ("Rows", "Columns", "NumberOfFrames"))
    n_frames = n_frames or 1
    _check_holds_pixels(header, rows * columns)
    if rows * columns > max_pixels:
        raise ValueError(f"{columns} x {rows} pixels, more than the {max_pixels} that are decoded; scale it down")
    if frame >= n_frames:
        raise ValueError(f"there is no frame {frame} in it, counted from 0; it holds {n_frames}")
    pixels = _pixels(source, header, frame)
    _take_from_frame(header, frame)
    kind = header.PhotometricInterpretation
    bits = int(header.get("BitsStored") or 8)
    if kind == "PALETTE COLOR":
        from pydicom.pixels import apply_color_lut

        pixels = apply_color_lut(pixels, header)
        bits = 16 if pixels.max() > 255 else 8  # some tables of 16 bits hold values of 8
    if pixels.ndim == 3:
        limits = grey.colour_limits(pixels, max(bits, 8))
        brightness = limits.brightness(pixels)
        rule = f"from 0 to {int(limits.white)} in colour" if bits > 8 else ""
        lost = grey.levels_lost(pixels, brightness) if rule else ""
        return Shown(grey.to_rgb(brightness), n_frames, rule, lost, [])
    return _grey(pixels, header, bits, n_frames)


def _check_holds_pixels(header: Dataset, n_pixels: int) -> None:
    """Refuse files that are no picture; the header ends where pixels begin."""
    what = header.get("SOPClassUID") or getattr(header, "file_meta", {}).get("MediaStorageSOPClassUID")
    if "DirectoryRecordSequence" in header or getattr(what, "keyword", "") == "MediaStorageDirectoryStorage":
        raise ValueError("this is a DICOMDIR, the list of what is on a disc; name one of the images that it lists")
    if "PhotometricInterpretation" not in header or not n_pixels:
        kind = f" ({what.name})" if what is not None and hasattr(what, "name") else ""
        raise ValueError(f"this DICOM file{kind} describes no pixels; name one that holds an image")


def _pixels(source: Path | bytes, header: Dataset, frame: int) -> np.ndarray:
    """Return stored values, (rows, columns) or (rows, columns, 3), with the bits that do not belong to them removed."""
    from pydicom.pixels import get_decoder, pixel_array
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    syntax = getattr(header, "file_meta", {}).get("TransferSyntaxUID")
    if syntax is None:
        implicit, little = header.original_encoding
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        header.file_meta.TransferSyntaxUID = syntax  # tables are read by it
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise ValueError(f"its pixels are stored as {syntax.name}, which pydicom does not decode") from error
    if not decoder.is_available:
        need = "; or ".join(decoder.missing_dependencies)
        raise ValueError(
            f"its pixels are compressed as {syntax.name}, and no decoder for that is installed ({need}): "
            f"pip install {'pyjpegls' if 'JPEG-LS' in syntax.name else 'pylibjpeg[all]'}, or store them uncompressed"
        )
    options: dict[str, Any] = {"transfer_syntax_uid": syntax}
    stored, high = header.get("BitsStored"), header.get("HighBit")
    below = int(high) + 1 - int(stored) if stored and high is not None and not syntax.is_compressed else 0
    if below > 0:  # pydicom takes the lowest bits
        options["bits_stored"] = int(high) + 1
    pixels = pixel_array(_file(source), index=frame, **options)
    return pixels >> below if below > 0 else pixels


def _take_from_frame(header: Dataset, frame: int) -> None:
    """Copy what an enhanced file keeps for all frames or one to where other files keep it."""
    shared, single = header.get("SharedFunctionalGroupsSequence"), header.get("PerFrameFunctionalGroupsSequence")
    groups = [*(shared or [])[:1], *(single or [])[frame : frame + 1]]
    for group in groups:
        for name in _PER_FRAME:
            for item in (group.get(name) or [])[:1]:
                header.update({element.tag: element for element in item})


def _grey(stored: np.ndarray, header: Dataset, bits: int, n_frames: int) -> Shown:
    picture = ~_padding(stored, header) & np.isfinite(stored)
    values = _modality(stored, header)
    brightness, rule, several = _voi(values, header)
    if brightness is None:
        if bits <= 8 and stored.dtype.kind in "iu" and not header.get("ModalityLUTSequence"):
            low = -(1 << bits - 1) if header.get("PixelRepresentation") else 0
            ends = _modality(np.array([low, low + (1 << bits) - 1]), header)
            limits = grey.Limits(float(ends.min()), float(ends.max()))
        else:
            limits, rule = grey.robust_limits(values[picture]), grey.ROBUST
        brightness = limits.brightness(values)
    if header.PhotometricInterpretation == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE":
        brightness = 1 - brightness
    lost = grey.levels_lost(values[picture], brightness[picture]) if rule else ""
    brightness[~picture] = 0
    remarks = [Remark(SEVERAL_WINDOWS, f"{several} of them")] if several > 1 else []
    return Shown(grey.to_rgb(brightness), n_frames, rule, lost, remarks)


def _padding(stored: np.ndarray, header: Dataset) -> np.ndarray:
    """Return which pixels the file calls padding: one stored value, or all from one to another."""
    for prefix in ("", "Float", "DoubleFloat"):
        value = _number(header.get(f"{prefix}PixelPaddingValue"), stored.dtype)
        limit = _number(header.get(f"{prefix}PixelPaddingRangeLimit"), stored.dtype)
        if value is not None:
            other = value if limit is None else limit
            return (stored >= min(value, other)) & (stored <= max(value, other))
    return np.zeros(stored.shape, bool)


def _number(value: Any, dtype: np.dtype) -> float | None:
    """Return a value in the pixels' type; files state it as unsigned even where pixels are signed, and as bytes."""
    if value is None or value == "" or value == b"":
        return None
    if isinstance(value, bytes):
        value = int.from_bytes(value[:2], "little")
    if dtype.kind == "i" and value >= 1 << 15:
        return float(value - (1 << 16))
    return float(value + (1 << 16)) if dtype.kind == "u" and value < 0 else float(value)


def _modality(stored: np.ndarray, header: Dataset) -> np.ndarray:
    from pydicom.pixels import apply_modality_lut

    # In 64 bits, because pydicom indexes tables in the pixels' own type; a slope of 0 would leave nothing.
    values = stored.astype(np.int64) if stored.dtype.kind in "iu" else stored.astype(np.float64)
    table = header.get("ModalityLUTSequence")
    slope = header.get("RescaleSlope")
    return values if not table and slope is not None and not float(slope) else apply_modality_lut(values, header)


def _voi(values: np.ndarray, header: Dataset) -> tuple[np.ndarray | None, str, int]:
    """Map modality values to brightness by the file's own table or window.

    Returns:
        Brightness from 0 to 1, or None if the file has neither; the rule; how many there are to choose from.
    """
    tables = header.get("VOILUTSequence")
    if tables:
        from pydicom.pixels import apply_voi

        entries, first, bits = (int(number) for number in tables[0].LUTDescriptor)
        inputs = np.clip(np.rint(values).astype(np.int64), first, first + (entries or 1 << 16) - 1)
        outputs = apply_voi(inputs, header)
        return outputs / ((1 << bits) - 1), "by the file's table", len(tables)
    centers, widths = _all(header.get("WindowCenter")), _all(header.get("WindowWidth"))
    if not centers or not widths or not widths[0] > 0:  # some files state a width of 0 for none
        return None, "", 0
    function = str(header.get("VOILUTFunction") or "LINEAR").strip().upper()
    rule = "by the file's window"
    return _window(values.astype(np.float64), centers[0], widths[0], function), rule, len(centers)


def _window(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    if function == "LINEAR" and width >= 1:  # the standard allows no narrower one, but files of float values have it
        center, width = center - 0.5, width - 1
    if width <= 0:  # a window of one value: a threshold
        return (values > center).astype(np.float64)
    if function == "SIGMOID":
        # tanh, which cannot overflow: 1 / (1 + exp(-4x)) = (1 + tanh(2x)) / 2
        return (1 + np.tanh(2 * (values - center) / width)) / 2
    return np.clip((values - center) / width + 0.5, 0, 1)


def _all(value: Any) -> list[float]:
    if value is None or value == "":
        return []
    return [float(one) for one in value] if hasattr(value, "__len__") and not isinstance(value, str) else [float(value)]


def _starts(source: Path | bytes) -> bytes:
    """Return the beginning, up to the mark behind the preamble."""
    if isinstance(source, bytes):
        return source[: _PREAMBLE + len(_MARK)]
    with source.open("rb") as file:
        return file.read(_PREAMBLE + len(_MARK))


def _file(source: Path | bytes) -> Path | BytesIO:
    return BytesIO(source) if isinstance(source, bytes) else source

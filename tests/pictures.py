"""Files of deep pixels, written by hand: Pillow cannot write them."""

from __future__ import annotations

import struct
import zlib

import numpy as np

PNG_COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}
"""The colour type of PNG by the number of channels."""


def png(values: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16 bits a channel from (rows, columns) or (rows, columns, channels), with further chunks."""
    rows, columns, *channels = values.shape
    header = struct.pack(">IIBBBBB", columns, rows, 16, PNG_COLOURS[(channels or [1])[0]], 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts
    )


def tiff(values: np.ndarray, *, photometric: int = 1, planar: int = 1, compressed: bool = False) -> bytes:
    """An uncompressed or deflated little-endian TIFF from (rows, columns) or (rows, columns, channels)."""
    rows, columns, *channels = values.shape
    n_channels = (channels or [1])[0]
    sheets = [values[..., channel] for channel in range(n_channels)] if planar == 2 else [values]
    strips = [np.ascontiguousarray(sheet).tobytes() for sheet in sheets]
    if compressed:
        strips = [zlib.compress(strip) for strip in strips]
    sample_format = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = {
        256: ("H", [columns]),
        257: ("H", [rows]),
        258: ("H", [8 * values.itemsize] * n_channels),
        259: ("H", [8 if compressed else 1]),
        262: ("H", [photometric]),
        273: ("I", [0] * len(strips)),
        277: ("H", [n_channels]),
        278: ("I", [rows]),
        279: ("I", [len(strip) for strip in strips]),
        284: ("H", [planar]),
        339: ("H", [sample_format] * n_channels),
    }
    start = 8 + 2 + 12 * len(tags) + 4
    beside = sum(size for kind, numbers in tags.values() if (size := struct.calcsize(kind) * len(numbers)) > 4)
    offset = start + beside
    tags[273] = ("I", [offset + sum(map(len, strips[:number])) for number in range(len(strips))])
    entries, extra = b"", b""
    for tag, (kind, numbers) in tags.items():
        content = struct.pack(f"<{len(numbers)}{kind}", *numbers)
        entries += struct.pack("<HHI", tag, {"H": 3, "I": 4}[kind], len(numbers))
        if len(content) > 4:
            entries += struct.pack("<I", start + len(extra))
            extra += content
        else:
            entries += content.ljust(4, b"\0")
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + extra + b"".join(strips)

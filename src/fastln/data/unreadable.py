"""Says what a file is that is not an image of a known format."""

from __future__ import annotations

import re
from pathlib import Path

_KINDS: tuple[tuple[bytes, str | None], ...] = (
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file itself; fetch that: git lfs pull"),
    (
        rb"(?s)/annex/objects/|(\.\./)*\.git/annex/",
        "a pointer of git-annex, not the file itself; fetch that: git annex get",
    ),
    (
        rb"(?is)\s*<(!doctype html|html|head|body)",
        "an HTML page, such as a server's error page; download the image again",
    ),
    (rb"(?is)\s*(<\?xml.{0,400})?(<!--.{0,400})?(<!doctype svg.{0,200})?<svg", "an SVG drawing; save it as PNG"),
    (rb"(?s)\s*<\?xml", "an XML file"),
    (rb"%PDF", "a PDF document; save its pages as PNG"),
    (rb"%!PS", "a PostScript file, which is a program; save it as PNG"),
    (rb"(?s)....ftyp(heic|heix|heif|mif1|msf1)", "a HEIC picture; save it as PNG or JPEG"),
    (rb"(?s)....ftypavi[fs]", "an AVIF picture; save it as PNG or JPEG"),
    (rb"(?s)....ftyp", "a film; save its pictures as PNG or JPEG"),
    (rb"\x00\x00[\x01\x02]\x00", "an icon or cursor; save it as PNG"),
    (rb"8BPS", "a Photoshop document; save it as PNG"),
    (rb"PK\x03\x04", "a ZIP archive; unpack it"),
    (rb"\x1f\x8b", "compressed by gzip; unpack it, and save a volume (.nii.gz) as pictures of its slices"),
    (rb"7z\xbc\xaf|Rar!|BZh|\xfd7zXZ", "an archive; unpack it"),
    (rb"(?s).{344}(n\+1|ni1)\x00", "a NIfTI volume; save its slices as PNG"),
    (rb"NRRD", "an NRRD volume; save its slices as PNG"),
    (rb"\x89HDF", "an HDF5 file; save its pictures as PNG"),
    (rb"\x93NUMPY", "an array of NumPy; save it as PNG"),
    (rb"(?s)(\x89PNG|\xff\xd8\xff|GIF8|BM|II\*\x00|MM\x00\*|RIFF....WEBP|\x00\x00\x00\x0cjP|P[1-6]\s)", None),
)


def kind_of(source: Path | bytes) -> str | None:
    """Return what a file is, as the end of a sentence that begins "it is".

    Returns:
        Empty if that is not known; None if it begins as an image of a known format.
    """
    if isinstance(source, bytes):
        start = source[:1024]
    else:
        with source.open("rb") as file:
            start = file.read(1024)
    if not start:
        return "empty (0 bytes); copy or download it again"
    if not start.strip(b"\x00"):
        return "nothing but zeros; copy or download it again"
    for pattern, words in _KINDS:
        if re.match(pattern, start):
            return words
    try:
        text = start.decode()
    except UnicodeDecodeError as error:
        text = start[: error.start].decode() if error.start > 1000 else ""
    if text.isprintable() or (text and all(mark.isprintable() or mark.isspace() for mark in text)):
        return f"text that begins {text.split(chr(10))[0][:40]!r}"
    return ""

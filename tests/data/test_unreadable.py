"""Files that are no images, or images that cannot be read: one line says which file, why, and what would be right."""

import gzip
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fastln.data import images
from fastln.errors import FastLNError


def refusal(content, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    told = []
    for function, source in ((images.check_image, path), (images.read_image, path), (images.read_image, content)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(FastLNError) as caught:
                function(source, "x.jpg")
        told.append(str(caught.value))
    assert "\n" not in told[0]
    assert told[0] == told[1] == told[2]
    assert told[0].startswith("x.jpg: ")
    return told[0]


def saved(form, **options):
    stream = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(stream, form, **options)
    return stream.getvalue()


def empty_png(columns, rows):
    """A PNG of black rows, which compress well; without IDAT's data if there are no pixels."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts
    )


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty (0 bytes); copy or download it again"),
        (bytes(5000), "it is nothing but zeros"),
        (
            b"\n<!DOCTYPE html>\n<html><body>404 Not Found</body></html>",
            "it is an HTML page, such as a server's error page",
        ),
        (POINTER, "it is a pointer of Git LFS, not the file itself; fetch that: git lfs pull"),
        (b"/annex/objects/SHA256E-s31--ab.jpg\n", "it is a pointer of git-annex"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "it is an SVG drawing; save it as PNG"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "it is an XML file"),
        (b'{"message": "Not Found"}', 'it is text that begins \'{"message": "Not Found"}\''),
        ("Röntgenbild fehlt\n".encode(), "it is text that begins 'Röntgenbild fehlt'"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "it is a PDF document"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is a HEIC picture; save it as PNG or JPEG"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "it is a film"),
        (b"PK\x03\x04" + bytes(9), "it is a ZIP archive; unpack it"),
        (gzip.compress(b"volume", mtime=0), "it is compressed by gzip"),
        (bytes(4).ljust(344, b"\1") + b"n+1\0" + bytes(9), "it is a NIfTI volume; save its slices as PNG"),
        (b"\x93NUMPY\x01\0", "it is an array of NumPy"),
        (b"\0\0\1\0\1\0", "it is an icon or cursor"),
        (empty_png(0, 5), "cannot read this image: it is damaged, or of a kind that is not read: copy it again"),
        (saved("PNG")[:12], "cannot read this image: it is damaged, or of a kind that is not read"),
        (saved("JPEG")[:2] + bytes(50), "this is not an image of a known format"),
        (b"P5 0 0 255\n", "cannot read this image: it is damaged"),
        (saved("JPEG2000")[:-20], "cannot read this image: it is damaged, or of a kind that is not read ("),
        (saved("WEBP")[:-20], "cannot read this image: it is damaged, or of a kind that is not read ("),
        (saved("JPEG")[:-20], "it is truncated or damaged: copy or download it again"),
        (saved("PNG")[:-30], "it is truncated or damaged: copy or download it again"),
        (empty_png(9000, 9000), "9000 x 9000 pixels, more than the 67108864 that are decoded; scale it down"),
        (empty_png(11000, 10000), "110,000,000 pixels, more than the 67108864 that are decoded; scale it down"),
        (empty_png(20000, 10000), "200,000,000 pixels, more than the 67108864 that are decoded; scale it down"),
    ],
)
def test_what_is_no_image(tmp_path, content, reason):
    assert reason in refusal(content, tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_long_texts_in_a_png_are_no_part_of_the_picture(tmp_path, zipped, monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 1000)
    texts = PngImagePlugin.PngInfo()
    for number in range(1 if zipped else 3):
        texts.add_text(f"Comment{number}", "x" * (2_000_000 if zipped else 400), zip=zipped)
    content = saved("PNG", pnginfo=texts)
    (tmp_path / "a.png").write_bytes(content)
    assert images.check_image(tmp_path / "a.png") == (8, 8, len(content))
    assert images.read_image(tmp_path / "a.png").getpixel((7, 7)) == (63, 63, 63)
    cut = content[:-30]
    assert "it is truncated or damaged: copy or download it again" in refusal(cut, tmp_path)


def test_a_missing_file_is_told_without_its_name_twice(tmp_path):
    path = tmp_path / "gone.png"
    with pytest.raises(FastLNError) as caught:
        images.read_image(path)
    assert str(caught.value) == f"{path}: cannot read this image: No such file or directory"

"""Image files of every kind to RGB, and those that cannot be read."""

import threading
import time
import warnings

import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from fastln.data import images
from fastln.errors import FastLNError


def read(path):
    return np.asarray(images.read_image(path))


@pytest.mark.parametrize(
    ("values", "grey"),
    [
        ([0, 257, 32768, 65535], [0, 1, 128, 255]),
        ([0, 2048, 4095, 16], [0, 128, 255, 1]),  # 12 bits
        ([0, 1, 200, 255], [0, 1, 200, 255]),
    ],
)
def test_deep_grey_is_scaled_by_its_bits(tmp_path, values, grey):
    Image.fromarray(np.array([values], np.uint16)).save(tmp_path / "deep.png")
    assert Image.open(tmp_path / "deep.png").mode.startswith("I")
    np.testing.assert_array_equal(read(tmp_path / "deep.png"), np.array([grey] * 3).T[None])


def test_signed_grey_starts_at_its_lowest_value(tmp_path):
    Image.fromarray(np.array([[-1024, 0, 3071]], np.int32)).save(tmp_path / "signed.tif")
    assert read(tmp_path / "signed.tif")[0, :, 0].tolist() == [0, 64, 255]


def test_palette_and_transparency(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png")
    assert read(tmp_path / "palette.png").tolist() == [[[10, 20, 30], [200, 100, 50]]]
    palette.save(tmp_path / "clear.png", transparency=0)
    assert read(tmp_path / "clear.png").tolist() == [[[0, 0, 0], [200, 100, 50]]]
    Image.new("RGBA", (1, 1), (255, 255, 255, 0)).save(tmp_path / "rgba.png")
    assert read(tmp_path / "rgba.png").tolist() == [[[0, 0, 0]]]


@pytest.mark.parametrize(("mode", "colour"), [("L", 9), ("1", 1), ("CMYK", (0, 0, 0, 0))])
def test_other_modes(tmp_path, mode, colour):
    Image.new(mode, (3, 2), colour).save(tmp_path / "image.tif")
    assert read(tmp_path / "image.tif").shape == (2, 3, 3)
    assert (read(tmp_path / "image.tif") == {"L": 9}.get(mode, 255)).all()


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_of_an_animation_the_first_image_is_taken(tmp_path, name):
    first, second = Image.new("L", (4, 3), 40), Image.new("L", (4, 3), 200)
    lossless = {"lossless": True} if name == "a.webp" else {}
    first.save(tmp_path / name, save_all=True, append_images=[second], **lossless)
    images.check_image(tmp_path / name)
    assert (read(tmp_path / name) == 40).all()


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (0, 0, 0, 255)).save(tmp_path / "ink.jpg")
    assert read(tmp_path / "ink.jpg").max() < 8


def test_stored_orientation_is_applied(tmp_path):
    image = Image.new("L", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert images.read_image(tmp_path / "turned.jpg").size == (4, 8)


def damaged(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1500])


def empty(path):
    path.write_bytes(b"")


def postscript(path):
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")


def nothing_finite(path):
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(path, format="TIFF")


def folder(path):
    path.mkdir()


def gone(path):
    pass


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("cut.jpg", damaged, "truncated"),
        ("cut.png", damaged, "truncated"),
        ("empty.png", empty, "not an image of a known format"),
        ("eps.png", postscript, "not an image of a known format"),
        ("float.tif", nothing_finite, "no pixel is a finite number"),
        ("folder.png", folder, "cannot read"),
        ("gone.png", gone, "cannot read"),
    ],
)
def test_an_unreadable_image_is_named(tmp_path, name, make, reason):
    make(tmp_path / name)
    for function in (images.read_image, images.check_image):
        with pytest.raises(FastLNError) as caught:
            function(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert reason in str(caught.value).lower()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp", "a.bmp", "a.tif", "a.jp2", "a.ppm"])
def test_a_file_cut_anywhere_is_found_by_the_check(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert images.check_image(tmp_path / name) == images.check_image(content, "bytes") == (64, 64, len(content))
    for share in (0.1, 0.5, 0.9):
        (tmp_path / name).write_bytes(content[: int(share * len(content))])
        with pytest.raises(FastLNError, match=name):
            images.check_image(tmp_path / name)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7)])
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_the_check_of_small_files(tmp_path, name, size):
    Image.new("RGB", size).save(tmp_path / name)
    images.check_image(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_the_check_of_progressive_and_large_files(tmp_path, name):
    ramp = np.add.outer(np.arange(900), np.arange(1200)) % 256
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / name, progressive=True)
    content = (tmp_path / name).read_bytes()
    images.check_image(tmp_path / name)
    with pytest.raises(FastLNError, match="bytes: cannot read"):
        images.check_image(content[: len(content) // 2], "bytes")


def test_a_jpeg_is_decoded_by_the_check_only_without_its_end(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    decoded = []
    load = JpegImageFile.load
    monkeypatch.setattr(JpegImageFile, "load", lambda image: (decoded.append(image), load(image))[1])
    images.check_image(tmp_path / "a.jpg")
    images.check_image(content, "bytes")
    assert not decoded
    images.check_image(content + b"and more", "bytes")  # some cameras and scanners write more
    assert len(decoded) == 1


def test_threads_that_read_at_once_leave_the_filters_of_warnings_as_they_were(tmp_path, monkeypatch):
    """Each sets a filter while it opens a file. The second to begin must not put back the first one's."""
    Image.new("L", (4, 3), 40).save(tmp_path / "a.png")
    opened, waits, together = Image.open, iter((0.05, 0.15)), threading.Barrier(2)

    def slow(*args, **kwargs):
        time.sleep(next(waits))
        return opened(*args, **kwargs)

    def work():
        together.wait()
        images.read_image(tmp_path / "a.png")

    monkeypatch.setattr(Image, "open", slow)
    before = list(warnings.filters)
    both = [threading.Thread(target=work) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert warnings.filters == before


@pytest.mark.parametrize("side", [8193, 20000])  # beyond our limit, and beyond the one at which Pillow raises
def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path, side):
    Image.new("1", (side, side)).save(tmp_path / "huge.png")
    for function in (images.read_image, images.check_image):
        with pytest.raises(FastLNError, match=r"huge\.png: cannot read .* pixels"):
            function(tmp_path / "huge.png")

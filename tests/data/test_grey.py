"""Pixels of more than 8 bits: what becomes black and white, in PNG, TIFF and arrays."""

import struct

import numpy as np
import pytest
from pictures import png, tiff
from PIL import Image

from fastln.data import grey, images
from fastln.errors import FastLNError

RAMP = np.arange(991).repeat(4).reshape(4, 991)


def read(content):
    images.check_image(content, "it")
    return np.asarray(images.read_image(content, "it"))


def levels(content, part=np.s_[:]):
    return len(np.unique(read(content)[..., 0][part]))


def padded(picture, value, share=0.5):
    """A picture with a frame of padding to its left."""
    return np.concatenate([np.full((len(picture), int(share * picture.shape[1])), value), picture], axis=1)


@pytest.mark.parametrize("padding", [-32768, -9000, 32767])
def test_padding_does_not_take_the_grey_levels(padding):
    values = padded(RAMP, padding)
    assert grey.robust_limits(values) == pytest.approx((0, 990), abs=1)
    assert levels(png(padded(RAMP, padding) + 32768)) == 256


def test_padding_and_a_burnt_in_mark_do_not_hide_each_other():
    values = padded(RAMP + 31768, 0)
    values[:, -40:] = 65535
    assert grey.robust_limits(values) == pytest.approx((31768, 32758), abs=15)


def test_hounsfield_units_stored_from_32768_keep_soft_tissue_apart():
    ct = np.concatenate([np.full(30_000, -1000), np.arange(-100, 200).repeat(100), np.arange(200, 1500).repeat(2)])
    ct[:3] = (30000, 3071, -1024)  # metal
    values = padded(ct.reshape(1, -1), -32768)
    grey_levels = read(png(values + 32768))[0, :, 0]
    tissue = (values[0] >= 0) & (values[0] < 100)
    assert len(np.unique(grey_levels[tissue])) >= 10
    assert (grey_levels[values[0] == -32768] == 0).all()


@pytest.mark.parametrize("shape", [(16, 16), (64, 64), (400, 400)])
@pytest.mark.parametrize("hot", [1, 3])
def test_hot_pixels_do_not_take_the_grey_levels(shape, hot):
    values = np.random.default_rng(0).integers(0, 2000, shape)
    values.flat[:hot] = 65535 - np.arange(hot) if shape != (16, 16) else 65535
    assert levels(png(values)) > 100


def test_a_thin_bright_structure_on_much_background_stays():
    values = np.zeros((400, 400), int)
    values[0, :300] = np.arange(1, 301)
    assert grey.robust_limits(values) == (0, 300)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 65535, 0, 0], [0, 255, 0, 0]),
        ([0, 1, 1, 0], [0, 255, 255, 0]),  # a mask
        ([7, 7, 7, 7], [0, 0, 0, 0]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
        ([0, 100, 200, 300], [0, 85, 170, 255]),
    ],
)
def test_few_values(values, expected):
    assert read(png(np.array([values])))[0, :, 0].tolist() == expected
    rare = np.zeros((100, 100), int)
    rare[0, 0] = 1  # a mask of one pixel
    assert read(png(rare)).max() == 255


def test_signed_wide_and_float_values():
    assert read(tiff(np.array([[-128, -1, 0, 127]], np.int8)))[0, :, 0].tolist() == [0, 127, 128, 255]
    assert read(tiff(np.array([[-300, 0, 300]], np.int16)))[0, :, 0].tolist() == [0, 128, 255]
    assert read(tiff(np.array([[0, 2**31, 2**32 - 1]], np.uint32)))[0, :, 0].tolist() == [0, 128, 255]
    floats = np.array([[-1.5, np.nan, 0, 1.5]], np.float32)
    assert read(tiff(floats))[0, :, 0].tolist() == [0, 0, 128, 255]


def test_white_may_be_zero_in_tiff():
    for dtype in (np.uint8, np.uint16, np.float32):
        values = np.array([[0, 51, 255]], dtype)
        assert read(tiff(values, photometric=0))[0, :, 0].tolist() == [255, 204, 0]


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("container", ["png", "tiff", "planar", "deflated"])
def test_deep_colours_are_scaled_by_their_bits(bits, container):
    white = (1 << bits) - 1
    values = np.array([[[0, white // 3, white], [1, white // 2, white - white // 3]]], np.uint16)
    make = {
        "png": png,
        "tiff": lambda values: tiff(values, photometric=2),
        "planar": lambda values: tiff(values, photometric=2, planar=2),
        "deflated": lambda values: tiff(values, photometric=2, compressed=True),
    }[container]
    np.testing.assert_array_equal(read(make(values)), np.rint(values.astype(int) * 255 / white))


def test_grey_stored_as_deep_colour_is_scaled_as_grey():
    values = padded(RAMP, -32768)[..., None].repeat(3, -1) + 32768
    assert levels(png(values)) == 256
    with_alpha = np.concatenate([values, np.full((*values.shape[:2], 1), 65535)], -1)
    assert levels(png(with_alpha)) == 256


def test_deep_colours_that_pillow_reads_by_half_are_refused():
    content = tiff(np.full((2, 2, 3), 999, np.uint16), photometric=2, planar=2, compressed=True)
    with pytest.raises(FastLNError, match="it: cannot read this image: compressed colours of 16 bits"):
        images.read_image(content, "it")


def test_deep_transparency_becomes_black():
    grey_alpha = np.array([[[4095, 65535], [4095, 0], [0, 65535], [2000, 65535]]], np.uint16)
    assert read(png(grey_alpha))[0, :, 0].tolist() == [255, 0, 0, 125]
    colour_alpha = np.array([[[65535, 0, 257, 65535], [65535, 65535, 65535, 0]]], np.uint16)
    assert read(png(colour_alpha)).tolist() == [[[255, 0, 1], [0, 0, 0]]]
    values = np.array([[0, 500, 1000, 60000]])
    assert read(png(values, (b"tRNS", struct.pack(">H", 60000))))[0, :, 0].tolist() == [0, 128, 255, 0]


def test_a_gamma_stated_in_a_png_is_applied_unless_it_is_the_usual_one(tmp_path):
    linear = round(255 * (100 / 255) ** (1 / 2.2))

    def with_gamma(gamma, *more):
        return png(np.array([[0, 257 * 100, 65535]]), (b"gAMA", struct.pack(">I", gamma)), *more)

    assert read(with_gamma(100_000))[0, :, 0].tolist() == [0, linear, 255]
    assert read(with_gamma(45_455))[0, :, 0].tolist() == [0, 100, 255]
    assert read(with_gamma(100_000, (b"sRGB", b"\0")))[0, :, 0].tolist() == [0, 100, 255]
    Image.fromarray(np.array([[0, 100, 255]], np.uint8)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    chunk = with_gamma(100_000).split(b"IHDR")[1][17 : 17 + 16]
    assert chunk[4:8] == b"gAMA"
    assert read(content[:33] + chunk + content[33:])[0, :, 0].tolist() == [0, linear, 255]


def test_values_that_fall_together_are_counted():
    values = np.arange(1000.0)
    assert grey.levels_lost(values, np.clip(values / 1e5, 0, 1)) == "982 different values of it become 4 of 256 levels"
    assert not grey.levels_lost(values, values / 999)
    assert not grey.levels_lost(np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    assert not grey.levels_lost(np.empty(0), np.empty(0))


def test_the_limits_do_not_depend_on_the_type():
    values = np.random.default_rng(0).integers(-2000, 2000, 5000)
    values[0] = 1 << 24  # too wide to count in a table
    assert grey.robust_limits(values) == grey.robust_limits(values.astype(np.float64))
    assert grey.robust_limits(values[1:].astype(np.int16)) == grey.robust_limits(values)
    assert grey.robust_limits(np.empty(0)) == (0, 0)

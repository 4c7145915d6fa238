"""DICOM files, made here by pydicom: rescaling, windows, inverted and coloured pixels, and what cannot be read."""

import sys

import numpy as np
import pytest

from fastln.data import images, load_source
from fastln.errors import FastLNError

pydicom = pytest.importorskip("pydicom")


def write(path, pixels, **fields):
    """Write pixels (frames, rows, columns, channels; of which the first and the last may be missing) uncompressed."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=bytes(128))
    colour = pixels.ndim >= 3 and pixels.shape[-1] == 3
    dataset.Rows, dataset.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    if pixels.ndim - colour == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.SamplesPerPixel = 3 if colour else 1
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes() + bytes(pixels.nbytes % 2)
    for name, value in fields.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def grey(path):
    images.check_image(path)
    image = images.read_image(path)
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].tolist()


CT = np.array([[0, 974, 1024, 1074, 1124, 4000]], np.uint16)
HOUNSFIELD = {"RescaleSlope": 1, "RescaleIntercept": -1024}  # CT - 1024: -1024, -50, 0, 50, 100, 2976


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # PS3.3 C.11.2.1.2.1: ((x - (c - 0.5)) / (w - 1) + 0.5) x 255
        ({"WindowCenter": 50, "WindowWidth": 101}, [0, 0, 1, 129, 255, 255]),
        ({"WindowCenter": [50, 9], "WindowWidth": [101, 9]}, [0, 0, 1, 129, 255, 255]),
        ({"WindowCenter": 50, "WindowWidth": 100, "VOILUTFunction": "LINEAR_EXACT"}, [0, 0, 0, 128, 255, 255]),
        ({"WindowCenter": 50, "WindowWidth": 100, "VOILUTFunction": "SIGMOID"}, [0, 5, 30, 128, 225, 255]),
        ({"WindowCenter": 50, "WindowWidth": 1}, [0, 0, 0, 255, 255, 255]),
        ({}, [0, 62, 65, 68, 72, 255]),  # the whole range
    ],
)
def test_windows(tmp_path, fields, expected):
    got = grey(write(tmp_path / "ct.dcm", CT, **HOUNSFIELD, **fields))
    assert got == [expected]
    inverted = write(tmp_path / "x.dcm", CT, PhotometricInterpretation="MONOCHROME1", **HOUNSFIELD, **fields)
    np.testing.assert_allclose(grey(inverted), 255 - np.array(got), atol=1)  # halves are rounded to even


def test_a_table_of_values_of_interest(tmp_path):
    table = pydicom.Dataset()
    table.LUTDescriptor = [3, 1, 12]
    table.LUTData = [0, 2048, 4095]
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    path = write(tmp_path / "dx.dcm", np.array([[0, 1, 2, 3, 9]], np.uint16), VOILUTSequence=[table])
    assert grey(path) == [[0, 0, 128, 255, 255]]


def test_signed_values_and_constant_images(tmp_path):
    assert grey(write(tmp_path / "s.dcm", np.array([[-100, 0, 100]], np.int16))) == [[0, 128, 255]]
    assert grey(write(tmp_path / "c.dcm", np.full((2, 2), 77, np.uint16))) == [[0, 0], [0, 0]]


def test_of_a_stack_the_first_frame_is_taken(tmp_path):
    stack = np.stack([np.full((2, 4), 10, np.uint8), np.full((2, 4), 250, np.uint8)])
    path = write(tmp_path / "stack.dcm", stack, WindowCenter=127.5, WindowWidth=255, VOILUTFunction="LINEAR_EXACT")
    assert grey(path) == [[10] * 4] * 2


def test_colour(tmp_path):
    pixels = np.array([[[1, 2, 3], [250, 0, 128]]], np.uint8)
    assert np.asarray(images.read_image(write(tmp_path / "rgb.dcm", pixels))).tolist() == pixels.tolist()
    palette = {}
    for name, values in (("Red", [0, 65535]), ("Green", [256, 0]), ("Blue", [32768, 128])):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [2, 0, 16]
        palette[f"{name}PaletteColorLookupTableData"] = np.array(values, np.uint16).tobytes()
    indices = np.array([[0, 1]], np.uint8)
    path = write(tmp_path / "p.dcm", indices, PhotometricInterpretation="PALETTE COLOR", **palette)
    assert np.asarray(images.read_image(path)).tolist() == [[[0, 1, 128], [255, 0, 0]]]


def test_a_file_is_known_by_its_mark_and_read_from_bytes(tmp_path):
    path = write(tmp_path / "ct.png", CT)
    assert images.read_image(path.read_bytes(), "bytes") == images.read_image(path)


def test_rows_may_name_dicom_files(tmp_path):
    write(tmp_path / "a.dcm", CT)
    (tmp_path / "rows.csv").write_text("image,question,answer\na.dcm,Is it?,yes\n")
    data = load_source(str(tmp_path / "rows.csv")).dataset("train")
    assert data.image("a.dcm").size == (6, 1)
    (tmp_path / "a.dcm").write_bytes((tmp_path / "a.dcm").read_bytes()[:-6])
    with pytest.raises(FastLNError, match=r'rows\.csv: row 0: image "a\.dcm": .*a\.dcm: cannot read this image: '):
        load_source(str(tmp_path / "rows.csv"))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda content: content[:-6], "cannot read this image: "),
        (lambda content: content[:400], "cannot read this image: "),
        (lambda content: bytes(128) + b"DICM", "cannot read this image: "),
        (lambda content: bytes(128) + b"DICO" + content[132:], "this is not an image of a known format"),
    ],
)
def test_damaged_files(tmp_path, spoil, reason):
    path = write(tmp_path / "ct.dcm", CT)
    path.write_bytes(spoil(path.read_bytes()))
    for function in (images.read_image, images.check_image):
        with pytest.raises(FastLNError) as caught:
            function(path)
        assert str(caught.value).startswith(f"{path}: {reason}")


def test_a_huge_image_is_refused_by_its_header(tmp_path):
    path = write(tmp_path / "huge.dcm", CT, Rows=9000, Columns=9000)
    with pytest.raises(FastLNError, match=r"9000 x 9000 pixels, more than the \d+ that are decoded"):
        images.read_image(path)


def test_without_pydicom(tmp_path, monkeypatch):
    write(tmp_path / "ct.dcm", CT)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(FastLNError, match=r"pydicom is needed: pip install 'fastln\[dicom\]'"):
        images.read_image(tmp_path / "ct.dcm")

"""DICOM files, made here by pydicom: rescaling, windows, inverted and coloured pixels, and what cannot be read."""

import io
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
        ({"WindowCenter": 50, "WindowWidth": 0.5}, [0, 0, 0, 128, 255, 255]),
        ({"WindowCenter": 50, "WindowWidth": 0}, [0, 62, 65, 68, 72, 255]),  # no window
        ({"WindowCenter": "", "WindowWidth": 1}, [0, 62, 65, 68, 72, 255]),
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


def padding_apart(path, n_levels=200):
    """The distinct levels of a ramp beside padding, which must be black."""
    pixels = np.array(grey(path))
    assert (pixels[:, :100] == 0).all()
    assert len(np.unique(pixels[:, 100:])) >= n_levels
    return pixels[0, 100:]


def ramp(dtype, padding, first=0):
    return np.array([[padding] * 100 + list(range(first, first + 991))] * 4, dtype)


@pytest.mark.parametrize(
    "fields",
    [
        {"PixelPaddingValue": -32768},
        {"PixelPaddingValue": -32768, "PixelPaddingRangeLimit": -30000},
        {"PixelPaddingValue": -30000, "PixelPaddingRangeLimit": -32768},
        {},  # without the tag, because it is far from all other values
        {"PixelPaddingValue": -32768, "RescaleSlope": 2, "RescaleIntercept": -1024},
    ],
)
def test_padding_is_no_picture(tmp_path, fields):
    shades = padding_apart(write(tmp_path / "a.dcm", ramp(np.int16, -32768), **fields))
    assert (shades[0], shades[495], shades[-1]) == (0, 128, 255)


def test_padding_is_black_in_every_window_and_shape(tmp_path):
    window = {"WindowCenter": 495, "WindowWidth": 990}
    low = {"PixelPaddingValue": 0, "PhotometricInterpretation": "MONOCHROME1"}
    shades = padding_apart(write(tmp_path / "a.dcm", ramp(np.uint16, 0, 1), **window, **low))
    assert (shades[0], shades[-1]) == (255, 0)
    padding_apart(write(tmp_path / "b.dcm", ramp(np.uint16, 4095), PixelPaddingValue=4095))
    near = {"PixelPaddingValue": -2000, "RescaleSlope": 1, "RescaleIntercept": 0}
    shades = padding_apart(write(tmp_path / "c.dcm", ramp(np.int16, -2000, -1000), **near))
    assert (shades[0], shades[-1]) == (0, 255)


def test_padding_of_float_pixels(tmp_path):
    values = np.array([[-1e9, 0, 0.5, 1]], np.float32)
    path = write(tmp_path / "f.dcm", values.view(np.uint32), FloatPixelPaddingValue=-1e9)
    dataset = pydicom.dcmread(path)
    dataset.FloatPixelData = values.tobytes()
    del dataset.PixelData, dataset.PixelRepresentation
    dataset.save_as(path)
    assert grey(path) == [[0, 0, 128, 255]]


def test_a_presentation_shape_inverts_once(tmp_path):
    values = np.array([[0, 100, 200]], np.uint16)
    assert grey(write(tmp_path / "a.dcm", values, PresentationLUTShape="INVERSE")) == [[255, 128, 0]]
    both = {"PresentationLUTShape": "INVERSE", "PhotometricInterpretation": "MONOCHROME1"}
    assert grey(write(tmp_path / "b.dcm", values, **both)) == [[255, 128, 0]]
    assert grey(write(tmp_path / "c.dcm", values, PresentationLUTShape="IDENTITY")) == [[0, 128, 255]]


@pytest.mark.parametrize(
    ("dtype", "fields", "values", "expected"),
    [
        (np.uint8, {}, [10, 60, 110], [10, 60, 110]),  # 8 bits are shown as they are
        (np.int8, {}, [-128, 0, 127], [0, 128, 255]),
        (np.uint8, {"BitsStored": 4, "HighBit": 3}, [0, 3, 15], [0, 51, 255]),
        (np.uint8, {"RescaleSlope": -1, "RescaleIntercept": 0}, [0, 55, 255], [255, 200, 0]),
        (np.uint8, {"RescaleSlope": 0, "RescaleIntercept": 0}, [0, 55, 255], [0, 55, 255]),  # no slope at all
        (np.uint16, {"RescaleSlope": 0, "RescaleIntercept": 5}, [0, 100, 200], [0, 128, 255]),
        (
            np.uint16,
            {"BitsStored": 12, "HighBit": 11},
            [0x8000, 0x7000 | 2048, 4095],
            [0, 128, 255],
        ),  # an overlay above
        (np.uint16, {"BitsStored": 12, "HighBit": 15}, [0 | 3, 2048 << 4 | 9, 4095 << 4], [0, 128, 255]),
        (np.int16, {"BitsStored": 12, "HighBit": 11}, [0x0800, 0, 0x07FF], [0, 128, 255]),  # signed in 12 bits
    ],
)
def test_stored_bits(tmp_path, dtype, fields, values, expected):
    assert grey(write(tmp_path / "a.dcm", np.array([values]).astype(dtype), **fields)) == [expected]


def table(first, bits, *data):
    item = pydicom.Dataset()
    item.LUTDescriptor = [len(data), first, bits]
    item.LUTData = list(data)
    item["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    item["LUTData"].VR = "US"
    return item


def test_tables_of_the_modality_and_of_interest(tmp_path):
    values = np.array([[0, 1, 2, 9]], np.uint16)
    modality = table(1, 16, 1000, 2000, 500)
    assert grey(write(tmp_path / "a.dcm", values, ModalityLUTSequence=[modality])) == [[85, 85, 255, 0]]
    window = {"WindowCenter": 1500, "WindowWidth": 1000, "VOILUTFunction": "LINEAR_EXACT"}
    assert grey(write(tmp_path / "b.dcm", values, ModalityLUTSequence=[modality], **window)) == [[0, 0, 255, 0]]
    interest = table(-100, 8, 0, 255)
    hounsfield = {"RescaleSlope": 0.5, "RescaleIntercept": -100.2, "VOILUTSequence": [interest, interest]}
    # A table is preferred to a window, as pydicom does; values below it get its first entry.
    assert grey(write(tmp_path / "c.dcm", values, **hounsfield, **window)) == [[0, 0, 255, 255]]
    assert grey(write(tmp_path / "d.dcm", values, VOILUTSequence=[], **{"WindowCenter": "", "WindowWidth": ""}))


def test_enhanced_files_keep_window_and_slope_per_frame(tmp_path):
    def group(center, slope):
        item, window, rescale = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        window.WindowCenter, window.WindowWidth, window.VOILUTFunction = center, 100, "LINEAR_EXACT"
        rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = slope, 0, "US"
        item.FrameVOILUTSequence, item.PixelValueTransformationSequence = [window], [rescale]
        return item

    stack = np.array([[[0, 50, 100, 100]]] * 2, np.uint16)
    path = write(tmp_path / "a.dcm", stack, PerFrameFunctionalGroupsSequence=[group(50, 1), group(100, 2)])
    assert grey(path) == [[0, 128, 255, 255]]
    assert np.asarray(images.read_image(path, frame=1))[0, :, 0].tolist() == [0, 128, 255, 255]
    shared = write(tmp_path / "b.dcm", stack, SharedFunctionalGroupsSequence=[group(100, 2)])
    assert grey(shared) == [[0, 128, 255, 255]]


def test_colours_of_12_bits(tmp_path):
    pixels = np.array([[[0, 2048, 4095], [1365, 16, 4000]]], np.uint16)
    path = write(tmp_path / "rgb.dcm", pixels, BitsStored=12, HighBit=11)
    assert np.asarray(images.read_image(path)).tolist() == [[[0, 128, 255], [85, 1, 249]]]
    planes = write(tmp_path / "planes.dcm", pixels, BitsStored=12, HighBit=11, PlanarConfiguration=1)
    dataset = pydicom.dcmread(planes)
    dataset.PixelData = np.moveaxis(pixels, -1, 0).tobytes()
    dataset.save_as(planes)
    assert images.read_image(planes) == images.read_image(path)


def test_what_is_to_be_said_is_said_once(tmp_path, caplog):
    write(tmp_path / "a.dcm", np.stack([CT] * 3), WindowCenter=[50, 9], WindowWidth=[101, 9], **HOUNSFIELD)
    write(tmp_path / "b.dcm", np.arange(3000, dtype=np.uint16)[None], WindowCenter=30000, WindowWidth=2)
    write(tmp_path / "c.dcm", np.arange(3000, dtype=np.uint16)[None])
    rows = "".join(f"{name}.dcm,Is it?,yes\n" for name in ("a", "b", "c", "a"))
    (tmp_path / "rows.csv").write_text(f"image,question,answer\n{rows}")
    with caplog.at_level("INFO"):
        load_source(str(tmp_path / "rows.csv"))
    told = "\n".join(caplog.messages)
    assert "rows: brightness of images of more than 8 bits" in told
    assert "2 by the file's window; 1 from the 0.1 to the 99.9 percentile, without padding" in told
    assert "rows: 1 image(s) hold several pictures, of which the first is used (write NAME#2 for the third); " in told
    assert "a.dcm: 3 pictures" in told
    assert "1 image(s) name several windows or tables, of which the first is used" in told
    assert "1 image(s) fill few of 256 grey levels" in told
    assert "b.dcm: 2,942 different values of it become 1 of 256 levels" in told
    assert told.count("several pictures") == 1


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


def test_luminance_and_chrominance_become_colours(tmp_path):
    pixels = np.array([[[76, 85, 255], [255, 128, 128]]], np.uint8)
    path = write(tmp_path / "ybr.dcm", pixels, PhotometricInterpretation="YBR_FULL")
    np.testing.assert_allclose(np.asarray(images.read_image(path)), [[[254, 0, 0], [255, 255, 255]]], atol=1)


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
        (lambda content: content[132:140], "cannot read this image: "),
    ],
)
def test_damaged_files(tmp_path, spoil, reason):
    path = write(tmp_path / "ct.dcm", CT)
    path.write_bytes(spoil(path.read_bytes()))
    for function in (images.read_image, images.check_image):
        with pytest.raises(FastLNError) as caught:
            function(path)
        assert str(caught.value).startswith(f"{path}: {reason}")


def without_meta(path, *, implicit):
    stream = io.BytesIO()
    dataset = pydicom.Dataset(pydicom.dcmread(path))
    pydicom.dcmwrite(stream, dataset, implicit_vr=implicit, little_endian=True)
    return stream.getvalue()


def test_without_preamble(tmp_path):
    first = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2", "VOILUTSequence": [table(0, 8, 0, 255)]}
    path = write(tmp_path / "ct.dcm", np.array([[0, 1]], np.uint16), **first)
    content = path.read_bytes()
    bare = [content[128:], content[132:], *(without_meta(path, implicit=implicit) for implicit in (True, False))]
    for part in bare:
        path.write_bytes(part)
        assert grey(path) == [[0, 255]]


def test_files_without_pixels(tmp_path):
    path = write(tmp_path / "a.dcm", CT, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    dataset = pydicom.dcmread(path)
    for name in ("PixelData", "PhotometricInterpretation", "Rows", "Columns"):
        delattr(dataset, name)
    dataset.save_as(path)
    with pytest.raises(FastLNError, match=r"this DICOM file \(Basic Text SR Storage\) describes no pixels"):
        images.read_image(path)
    dataset.DirectoryRecordSequence = []
    dataset.save_as(path)
    with pytest.raises(FastLNError, match="this is a DICOMDIR, the list of what is on a disc"):
        images.read_image(path)
    with pytest.raises(FastLNError, match="describes no pixels"):
        images.read_image(write(tmp_path / "b.dcm", CT, Rows=0))


@pytest.mark.parametrize(
    ("syntax", "reason"),
    [
        ("1.2.840.10008.1.2.4.80", "JPEG-LS Lossless .*, and no decoder for that is installed.*pip install pyjpegls"),
        ("1.2.840.10008.1.2.4.70", r"JPEG Lossless.* pip install pylibjpeg\[all\]"),
        ("1.2.840.10008.1.2.4.102", "stored as MPEG-4 .*, which pydicom does not decode"),
    ],
)
def test_compressed_without_a_decoder(tmp_path, monkeypatch, syntax, reason):
    path = write(tmp_path / "a.dcm", CT)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = pydicom.encaps.encapsulate([b"12345678"])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(path)
    monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.is_available", False)
    with pytest.raises(FastLNError, match=reason) as caught:
        images.read_image(path)
    assert "\n" not in str(caught.value)


def test_there_is_no_such_frame(tmp_path):
    with pytest.raises(FastLNError, match="there is no frame 3 in it, counted from 0; it holds 2"):
        images.read_image(write(tmp_path / "a.dcm", np.stack([CT, CT])), frame=3)


def test_a_huge_image_is_refused_by_its_header(tmp_path):
    path = write(tmp_path / "huge.dcm", CT, Rows=9000, Columns=9000)
    with pytest.raises(FastLNError, match=r"9000 x 9000 pixels, more than the \d+ that are decoded"):
        images.read_image(path)


def test_without_pydicom(tmp_path, monkeypatch):
    write(tmp_path / "ct.dcm", CT)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(FastLNError, match=r"pydicom is needed: pip install 'fastln\[dicom\]'"):
        images.read_image(tmp_path / "ct.dcm")

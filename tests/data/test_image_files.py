"""Images are found by the names in rows, however these are spelled, and the reason is told where none fits."""

import unicodedata

import numpy as np
import pytest
from PIL import Image

from fastln.data import load_source
from fastln.data.files import BadRowError, shown
from fastln.data.image_files import ImageFinder, located

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "Lungenödem.png") for form in ("NFC", "NFD"))


@pytest.fixture
def folder(tmp_path):
    for name in (
        "a.png",
        "Sub/B.PNG",
        "my image.png",
        "scan#1.png",
        COMPOSED,
        "twin/x.png",
        "twin/X.png",
        "photo.jpeg",
    ):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2)).save(path)
    (tmp_path / "images" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    Image.new("L", (2, 2)).save(tmp_path / "outside.png")
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("name", "key", "spelling"),
    [
        ("a.png", "a.png", ""),
        ("./a.png", "a.png", ""),
        ("Sub//B.PNG", "Sub/B.PNG", ""),
        ("Sub\\B.PNG", "Sub/B.PNG", "backslashes"),
        (".\\sub\\b.png", "Sub/B.PNG", "backslashes and other case"),
        ("A.png", "a.png", "other case"),
        ("my%20image.png", "my image.png", "%-escapes"),
        ("file:{folder}/my%20image.png", "my image.png", "file:// and %-escapes"),
        ("file://{folder}/a.png", "a.png", "file://"),
        ("file://localhost{folder}/a.png", "a.png", "file://"),
        ("{folder}/Sub/B.PNG", "Sub/B.PNG", ""),
        (DECOMPOSED, COMPOSED, "another Unicode form (NFC or NFD)"),
        (DECOMPOSED.upper(), COMPOSED, "other case and Unicode form"),
        ("twin/x.png", "twin/x.png", ""),
        ("scan#1.png", "scan#1.png", ""),
        ("a.png#2", "a.png#2", ""),
        ("scan#1.png#02", "scan#1.png#2", ""),
        ("sub\\b.png#7", "Sub/B.PNG#7", "backslashes and other case"),
    ],
)
def test_found(folder, name, key, spelling):
    found = ImageFinder([folder]).find(name.format(folder=folder))
    assert found == (folder, key, spelling)
    path, frame = located(folder, key)
    assert path.is_file()
    assert frame == (
        {"2": 2, "7": 7}.get(key.rpartition(".")[2].rpartition("#")[2]) if ".png#" in key.lower() else None
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("b.png", "is missing in {folder}"),
        ("b.png#3", "is missing in {folder}"),
        ("photo.jpg", 'is missing in {folder}; there is "photo.jpeg", of another type'),
        ("photo", 'is missing in {folder}; there is "photo.jpeg", of another type'),
        ("data/images/a.png", 'is missing in {folder}; there is "a.png": write that'),
        ("../images/a.png/../../outside.png", "leads outside the folder {folder}"),
        ("twin/x.PNG", 'is missing in {folder}, where only case differs: "X.png" and "x.png"'),
        ("gone.png", "is missing in {folder}: it is a link to {folder.parent}/nowhere.png, which is missing"),
        ("Sub", "is missing in {folder}: it is a folder"),
        ("../outside.png", "leads outside the folder {folder}"),
        ("..\\outside.png", "leads outside the folder {folder}"),
        ("%2e%2e/outside.png", "leads outside the folder {folder}"),
        (
            "/home/ann/images/a.png",
            'it is absolute, and names are relative to the folder; there is "a.png": write that',
        ),
        ("C:\\data\\Sub\\B.PNG", 'it is absolute, and names are relative to the folder; there is "Sub/B.PNG": write'),
        ("https://example.org/a.png", "is an address; images are files: download it"),
        ("data:image/png;base64,AAAA", "is an address"),
        ("x\0.png", ": "),
        ("x" * 5000, ": "),
    ],
)
def test_not_found(folder, name, reason):
    with pytest.raises(BadRowError) as caught:
        ImageFinder([folder]).find(name)
    assert str(caught.value).startswith(f"image {shown(name, 200)}")
    assert reason.format(folder=folder) in str(caught.value)


def test_names_are_shown_readably():
    assert shown("Lungenödem 肺") == '"Lungenödem 肺"'
    assert shown("half \ud800").encode() == b'"half \\ud800"'


def test_one_file_has_one_key_and_the_spelling_is_told_once(folder, caplog):
    rows = "".join(f"{name},Is it?,yes\n" for name in ("a.png", "A.PNG", "a.PNG", "a.png", "Sub\\B.PNG"))
    (folder.parent / "train.csv").write_text(f"image,question,answer\n{rows}")
    source = load_source(str(folder.parent))
    assert [sample.image for sample in source.splits["train"]] == ["a.png"] * 4 + ["Sub/B.PNG"]
    (told,) = [message for message in caplog.messages if "spelling" in message]
    assert "3 image(s) are named in another spelling than their files, and were found; the first is" in told
    assert '"A.PNG": a.png (other case)' in told


def test_rows_may_name_the_pictures_of_a_file(tmp_path, caplog):
    pictures = [Image.fromarray(np.full((2, 2), shade, np.uint8)) for shade in (10, 90, 200)]
    pictures[0].save(tmp_path / "stack.tif", save_all=True, append_images=pictures[1:])
    rows = "".join(f"stack.tif{frame},Is it?,yes\n" for frame in ("#2", "#0", "#1"))
    (tmp_path / "train.csv").write_text(f"image,question,answer\n{rows}")
    data = load_source(str(tmp_path)).dataset("train")
    assert [data.image(sample.image).getpixel((0, 0))[0] for sample in data.samples] == [200, 10, 90]
    assert "several pictures" not in caplog.text
    (tmp_path / "train.csv").write_text(f"image,question,answer\n{rows}stack.tif,Is it?,no\n")
    load_source(str(tmp_path))
    assert "1 image(s) hold several pictures, of which the first is used (write NAME#2 for the third)" in caplog.text


def test_pictures_of_one_file_are_no_copies_of_each_other(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "stack.tif", save_all=True, append_images=[Image.new("L", (2, 2), 9)])
    for split, frame in (("train", "#1"), ("test", "#0")):
        (tmp_path / f"{split}.csv").write_text(f"image,question,answer\nstack.tif{frame},Is it?,yes\n")
    assert len(load_source(str(tmp_path)).splits["train"]) == 1
    (tmp_path / "test.csv").write_text("image,question,answer\nstack.tif#1,Is it?,yes\nstack.tif,Is it?,yes\n")
    assert not load_source(str(tmp_path)).splits["train"]

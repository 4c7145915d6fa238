"""What every reader does alike: rows become samples, bad rows are told or skipped, images stay where they belong."""

import logging
import pickle
import tracemalloc
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, Layout, jpeg, save

from fastln.data import DataOptions, Sample, demands, load_dataset, load_source
from fastln.errors import FastLNError

SKIP = DataOptions(skip_bad_rows=True)


@pytest.fixture(params=LAYOUTS)
def name(request) -> str:
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return request.param


@pytest.fixture
def layout(name) -> Layout:
    return LAYOUTS[name]


FIRST = {
    "slake": Sample("11", "xmlab1/source.jpg", "What modality is this?", "MRI", False),
    "parquet": Sample(
        "train-00000-of-00002-abc/000000", "train-00000-of-00002-abc/000000", "what is seen?", "nuclei", None
    ),
    "path-vqa": Sample("train-0", "train/x_0001.jpg", "what is seen?", "nuclei", None),
    "iu-xray": Sample(
        "CXR1_IM-0001",
        "CXR1_IM-0001/0.png",
        "",
        "The heart is normal . No effusion .",
        None,
        views=("CXR1_IM-0001/1.png",),
    ),
    "llava-med": Sample(
        "fig_1", "1.jpg", "Is it normal?", "Yes.", None, history=(("What is shown?", "An MRI of the knee."),)
    ),
    "plain, jsonl": Sample("0", "1.jpg", "Is it normal?", "no", None),
    "plain, csv": Sample("0", "1.jpg", "Is it normal?", "no", None),
}


def refusal(spec, options=None):
    with pytest.raises(FastLNError) as caught:
        load_source(spec, options)
    return str(caught.value)


def test_rows_become_samples_and_splits_are_as_published(tmp_path, name, layout):
    spec = layout.make(tmp_path, train=[layout.row(number) for number in (1, 2, 1)], test=[layout.row(3)])
    source = load_source(spec)
    assert {split: len(samples) for split, samples in source.splits.items()} == {"train": 3, "validation": 1, "test": 1}
    assert source.splits["train"][0] == FIRST[name]
    assert not source.synthetic
    assert load_dataset(spec, "validation").samples == source.splits["validation"]
    first, second, again = source.splits["train"]
    assert first.image == again.image != second.image


def test_images_decode_and_their_reader_can_be_sent_to_workers(tmp_path, name, layout):
    source = load_source(layout.make(tmp_path, train=[layout.row(number) for number in (0, 1, 2, 3)]))
    data = pickle.loads(pickle.dumps(source)).dataset("train")
    images = [data.image(key) for sample in data.samples for key in sample.images]
    assert {image.mode for image in images} == {"RGB"}
    assert len({image.tobytes() for image in images}) == len(images)
    stats = [source.stats[key] for sample in data.samples for key in sample.images]
    assert [(stat.width, stat.height) for stat in stats] == [image.size for image in images]
    if name != "iu-xray":
        assert [stat.n_bytes for stat in stats] == [len(jpeg(number)) for number in range(4)]
    with pytest.raises(FastLNError, match=r"no question .* '\.\./x\.png'"):
        data.image("../x.png")


def test_what_is_asked_of_a_model(tmp_path, name, layout):
    asked = {"iu-xray": {"several images", "reports"}, "llava-med": {"conversations"}}
    assert demands(load_dataset(layout.make(tmp_path), "train").samples) == asked.get(name, set()) | {"images"}


def bad_rows(name, layout, folder):
    """Rows that are bad, each in its own way, with what is said of them; the dataset will lie in `folder`/data."""
    good = layout.row(1)
    rows = [(layout.answer(good, " "), "is empty")]
    if name != "slake":  # as published, it has one
        rows += [(layout.answer(good, ""), "is empty")]
    if name != "iu-xray":
        rows += [(layout.answer(good, "?!"), "which is empty after normalising")]
    if name == "parquet":
        rows += [(layout.image(good, None), "field 'image' holds no bytes")]
        rows += [(layout.image(good, b""), "field 'image' holds no bytes")]
        rows += [(layout.image(good, b"no image"), "this is not an image of a known format")]
        rows += [(layout.image(good, jpeg(9)[:1000]), "truncated")]
        return rows
    images = {"slake": "imgs", "path-vqa": "images/train"}.get(name, "images")
    secret = save(folder / "secret.jpg", jpeg(5))
    save(folder / "data" / images / "text.jpg", b"no image")
    save(folder / "data" / images / "cut.jpg", jpeg(9)[:1000])
    (folder / "data" / images / "link.jpg").symlink_to(secret)
    up = "../" * (images.count("/") + 2)
    fixed = name == "path-vqa"  # which has the suffix and the split's folder to itself
    names = {
        "gone.jpg": "is missing in",
        f"{up}secret.jpg": "leads outside the folder",
        str(secret): "is missing in" if fixed else "leads outside the folder",
        "link.jpg": "leads outside the folder",
        "text.jpg": "this is not an image of a known format",
        "cut.jpg": "truncated",
        " ": "is empty",
    }
    return rows + [
        (layout.image(good, name.removesuffix(".jpg") if fixed else name), why) for name, why in names.items()
    ]


def test_each_bad_row_is_told_with_file_index_and_reason(tmp_path, name, layout):
    bad = bad_rows(name, layout, tmp_path)
    spec = layout.make(tmp_path / "data", train=[layout.row(0), *(row for row, _ in bad)])
    first, *lines, last = refusal(spec).splitlines()
    count = f"{len(bad)} bad row(s) of {len(bad) + len(layout.splits)}"
    assert first == f"{count}, counted from 0:"
    assert last == f"That was {count}; --skip-bad-rows (DataOptions.skip_bad_rows) leaves them out."
    where = {"iu-xray": "annotation.json: train"}.get(name, "train")
    in_first = len(bad) // 2 + 1 if name == "parquet" else 100  # two files share the rows there
    for number, ((_, reason), line) in enumerate(zip(bad, lines, strict=True), start=1):
        index = number if number < in_first else number - in_first
        assert str(tmp_path / "data") in line
        assert where in line
        assert f": row {index}" in line
        assert reason in line


def test_all_bad_rows_of_all_files_are_told_at_once_or_skipped_with_a_count(tmp_path, name, layout, caplog):
    bad = [row for row, _ in bad_rows(name, layout, tmp_path)]
    rows = [layout.row(0), *bad[:3], layout.row(1), *bad[3:]]
    spec = layout.make(tmp_path / "data", train=rows, test=[layout.row(2), layout.answer(layout.row(3), "")])
    message = refusal(spec)
    assert message.startswith(f"{len(bad) + 1} bad row(s) of {len(rows) + 3}, counted from 0:\n")
    assert message.count(": row ") == len(bad) + 1
    with caplog.at_level(logging.INFO, "fastln"):
        source = load_source(spec, SKIP)
    assert f"skipped {message.rpartition('That was ')[0]}" in caplog.text  # every row that would have been refused
    assert {split: len(samples) for split, samples in source.splits.items()} == {"train": 2, "validation": 1, "test": 1}


def test_an_image_is_checked_once(tmp_path, name, layout, monkeypatch):
    checked = []
    monkeypatch.setattr("fastln.data.rows.check_image", lambda path, **_: checked.append(path))
    monkeypatch.setattr("fastln.data.parquet.check_image", lambda content, what, **_: checked.append(content))
    load_source(layout.make(tmp_path, train=[layout.row(number) for number in (1, 2, 1, 2, 2)]))
    assert len(checked) == len(set(checked))
    assert checked


@pytest.mark.parametrize("name", ["slake", "iu-xray", "llava-med", "plain, jsonl", "plain, csv"])
def test_what_is_held_is_the_samples_not_the_files(tmp_path, name):
    layout = LAYOUTS[name]
    row = layout.row(1) | {"caption": "x" * 20_000}
    spec = layout.make(tmp_path, train=[row] * 600)
    load_source(spec)  # what is loaded and compiled once is not the question
    tracemalloc.start()
    try:
        samples = load_source(spec).splits["train"]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(samples) == 600
    assert peak < 4e6, peak  # of 12 MB


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["../x", "a\0", "yes", "en"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(["from", "value"]), values),
    max_leaves=6,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ("parquet", "plain, csv")])
def test_whatever_a_field_holds_the_row_is_good_or_told(name, data, caplog):
    caplog.clear()
    row = LAYOUTS[name].row(0)
    row[data.draw(st.sampled_from(list(row)))] = data.draw(JSON)
    with TemporaryDirectory() as folder:
        spec = LAYOUTS[name].make(Path(folder), train=[row, LAYOUTS[name].row(1)])
        kept = load_source(spec, SKIP).splits["train"]
        assert all(sample.answer.encode() and sample.id.encode() for sample in kept)
        if "skipped" in caplog.text:
            assert refusal(spec).startswith("1 bad row(s)")
            assert len(kept) == 1
        else:
            assert load_source(spec).splits["train"] == kept


def test_data_with_no_usable_row(tmp_path, layout):
    spec = layout.make(tmp_path / "empty", train=[])
    with pytest.raises(FastLNError, match="the train split holds no usable row"):
        load_dataset(spec, "train")
    assert len(load_dataset(spec, "test")) == 1
    spec = layout.make(tmp_path / "bad", train=[layout.answer(layout.row(0), "")])
    with pytest.raises(FastLNError, match="the train split holds no usable row"):
        load_dataset(spec, "train", options=SKIP)

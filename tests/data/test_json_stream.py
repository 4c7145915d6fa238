"""JSON taken apart while it is read: the same values as from the whole, the same errors, and little read ahead."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastln.data import json_stream
from fastln.data.json_stream import JsonStream
from fastln.errors import FastLNError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(autouse=True, params=[1, 2, 5, 1 << 20])
def chunk(request, monkeypatch):
    monkeypatch.setattr(json_stream, "_CHUNK", request.param)
    return request.param


def stream(text):
    return JsonStream(io.StringIO(text), Path("rows.json"))


def taken_apart(text):
    content = stream(text)
    is_object = content.peek() == "{"
    value = {name: content.value() for name in content.names()} if is_object else list(content.items())
    content.end()
    return value


@settings(max_examples=60, deadline=None)
@given(
    value=st.lists(VALUES, max_size=5) | st.dictionaries(st.text(), VALUES, max_size=5),
    indent=st.sampled_from([None, 1]),
)
def test_values_are_those_of_the_whole(value, indent):
    assert taken_apart(json.dumps(value, indent=indent)) == value
    assert taken_apart(f" {json.dumps(value, indent=indent, ensure_ascii=False)}\r\n") == value


NUMBERS = "[1, -2.5, 1e3, 1.25E-2, NaN, -Infinity, true, null]"


def test_values_that_go_on_behind_what_was_read():
    assert repr(taken_apart(NUMBERS)) == repr(json.loads(NUMBERS))


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1},\n {"a" 2}]',
        "[1,\n 2,\n\n  x]",
        "[1, 2",
        "[1 2]",
        '["abc',
        '["a\nb"]',
        "[1] 2",
        "[-]",
        '{"a": 1, "b" 2}',
        '{"a": 1, b: 2}',
        '{"a": [1}',
        '{"a": 1',
        '{"a',
        "{1: 2}",
    ],
)
def test_errors_are_told_where_the_whole_has_them(text):
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(text)
    with pytest.raises(FastLNError) as caught:
        taken_apart(text)
    place = f"rows.json: line {expected.value.lineno}, column {expected.value.colno}: not valid JSON: "
    assert str(caught.value).startswith(place)


@pytest.mark.parametrize("text", ["[" * 200_000, f"[{'9' * 5000}]"])
def test_what_python_refuses(text, chunk):
    if chunk > 5:  # many digits in small pieces take long
        with pytest.raises(FastLNError, match=r"rows\.json: line 1, column 2: not valid JSON: "):
            taken_apart(text)


def test_little_is_read_ahead(chunk):
    text = io.StringIO(json.dumps([{"a": "b" * 100}] * 1_000))
    next(JsonStream(text, Path("rows.json")).items())
    assert text.tell() <= max(1_000, chunk)

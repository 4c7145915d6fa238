"""The units that multiply bfloat16 rows: measured once per machine, kept in a file, or chosen by the user."""

import json
import logging

import pytest
import torch

from fastln.errors import FastLNError
from fastln.ops.backends import resolve
from fastln.ops.settings import DEFAULT
from fastln_kernels.cpu import native_linear, products, units

WHY_NOT = products.why_not("linear")
RATES = {"float32": 187e9, "bfloat16": 106e9, "int8": 700e9}


def forget():
    told = (units._tell_float32, units._tell_torch)
    for cached in (units.rates, units.linear_rates, units._for_bfloat16, *told, resolve):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(units.VARIABLE, raising=False)
    forget()
    yield tmp_path / "cache"
    forget()


@pytest.fixture
def measured(monkeypatch):
    """Pretend to measure what stands in the list, and take it from there; say how often."""
    results = []
    monkeypatch.setattr(units, "_measure", lambda: results.pop(0))
    return results


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_what_is_measured_is_what_works(monkeypatch):
    monkeypatch.delenv("FASTLN_CACHE")  # where the library is compiled already
    rates = units._measure()
    usable = {str(dtype).removeprefix("torch.") for dtype in products.usable("units")}
    assert set(rates) == usable | ({"int8"} if products.in_8_bits("units") else set())
    assert all(1e8 < rate < 1e15 for rate in rates.values())


def test_the_first_process_measures_and_the_next_one_reads(measured, cache):
    measured += [RATES, {"float32": 1e9}]
    assert units.rates() == RATES
    (file,) = cache.iterdir()
    assert json.loads(file.read_text()) == RATES
    forget()
    assert units.rates() == RATES
    assert len(measured) == 1


@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
def test_a_float32_layer_is_timed_on_one_thread_and_exactly(monkeypatch):
    monkeypatch.delenv("FASTLN_CACHE")
    n_threads = torch.get_num_threads()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rates = units._measure_linear(native_linear.linear)
    assert set(rates) == {"fastln", "torch"}
    assert all(1e8 < rate < 1e15 for rate in rates.values())
    assert torch.get_num_threads() == n_threads


@pytest.mark.parametrize(
    ("fastln", "words"), [(109e9, "100 GFLOP/s a thread here; fastln's kernel reaches 109"), (111e9, None)]
)
def test_float32_rows_have_the_kernel_only_where_it_is_faster_and_torch_is_told_once(
    fastln, words, monkeypatch, cache, caplog
):
    results = [{"fastln": fastln, "torch": 100e9}, {"fastln": 9e9, "torch": 100e9}]
    monkeypatch.setattr(units, "_measure_linear", lambda _: results.pop(0))
    with caplog.at_level(logging.INFO, logger="fastln"):
        assert units.float32_pays(native_linear.linear, quietly=True) == (words is None)
        assert not caplog.records
        units.linear_rates.cache_clear()
        assert [units.float32_pays(native_linear.linear) for _ in range(3)] == [words is None] * 3  # from the file
    told = [record.message for record in caplog.records]
    assert len(told) == (words is not None)
    assert words is None or words in told[0]
    (file,) = cache.iterdir()
    assert file.name.startswith("linear-rates-")


def test_the_first_of_two_that_measure_at_once_counts(measured, monkeypatch):
    path, other = units._file(), {"float32": 2e9}
    assert units._keep(path, RATES, {"float32"}) == RATES
    assert units._keep(path, other, {"float32"}) == RATES
    assert [file.name for file in path.parent.iterdir()] == [path.name]


DAMAGED = ("", "{", "[]", "{}", '{"float32": "fast"}', '{"float32": 0}', '{"float32": [1]}', '{"bfloat16": 1e9}')


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_measured_again(content, measured, cache):
    cache.mkdir()
    units._file().write_text(content)
    measured += [RATES]
    assert units.rates() == RATES
    forget()
    assert units.rates() == RATES


def test_without_a_place_for_the_file_it_says_so(measured, cache, caplog):
    cache.write_text("a file")
    measured += [RATES]
    assert units.rates() == RATES
    assert "measured again in each process" in caplog.text


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"])
def test_other_instructions_have_another_file(variable, monkeypatch):
    monkeypatch.delenv(variable, raising=False)
    paths = {units._file()}
    for value in ("AVX2", "AVX512_CORE"):
        monkeypatch.setenv(variable, value)
        paths.add(units._file())
    monkeypatch.setattr(units.library, "processor", lambda: "another")
    paths.add(units._file())
    monkeypatch.setattr(torch, "__version__", "9.9")
    paths.add(units._file())
    assert len(paths) == 5


@pytest.mark.parametrize(
    ("bfloat16", "expected", "words"),
    [
        (
            106e9,
            torch.float32,
            "measured at 187 GFLOP/s a thread here; bfloat16 reaches 106 (FASTLN_CPU_UNIT=bfloat16 ",
        ),
        (170e9, torch.bfloat16, None),  # converting would cost what it gains
        (1400e9, torch.bfloat16, None),
        (None, torch.float32, "this processor has no bfloat16 products"),
    ],
)
def test_the_faster_units_serve_and_float32_for_bfloat16_is_told_once(bfloat16, expected, words, measured, caplog):
    measured += [{"float32": 187e9} | ({"bfloat16": bfloat16} if bfloat16 else {})]
    with caplog.at_level(logging.INFO, logger="fastln"):
        assert [units.compute_dtype(torch.bfloat16) for _ in range(3)] == [expected] * 3
    told = [record.message for record in caplog.records]
    assert len(told) == (words is not None)
    assert words is None or words in told[0]
    assert units.compute_dtype(torch.float32) == units.compute_dtype(torch.float16) == torch.float32


def test_who_asks_without_such_rows_is_told_nothing_and_who_has_them_is(measured, caplog):
    measured += [{"float32": 187e9}]
    with caplog.at_level(logging.INFO, logger="fastln"):
        assert units.compute_dtype(torch.bfloat16, quietly=True) == torch.float32
        assert not caplog.records
        assert units.compute_dtype(torch.bfloat16) == torch.float32
    assert [record.message for record in caplog.records] == [
        "bfloat16 rows are multiplied as float32: this processor has no bfloat16 products"
    ]


def test_the_user_chooses_in_silence(measured, monkeypatch, caplog):
    measured += [RATES]
    with caplog.at_level(logging.INFO, logger="fastln"):
        for name, dtype in units.UNITS.items():
            monkeypatch.setenv(units.VARIABLE, name)
            assert units.compute_dtype(torch.bfloat16) == dtype
    assert not caplog.records


def test_a_choice_that_cannot_be_is_an_error(measured, monkeypatch):
    monkeypatch.setenv(units.VARIABLE, "bf16")
    with pytest.raises(ValueError, match="FASTLN_CPU_UNIT is 'bf16'; it must be bfloat16 or float32, or unset"):
        units.compute_dtype(torch.bfloat16)
    with pytest.raises(FastLNError, match="FASTLN_CPU_UNIT is 'bf16'"):
        resolve("linear", torch.device("cpu"), DEFAULT)
    measured += [{"float32": 187e9}]
    monkeypatch.setenv(units.VARIABLE, "bfloat16")
    with pytest.raises(ValueError, match="bfloat16 products do not work on this processor"):
        units.compute_dtype(torch.bfloat16)

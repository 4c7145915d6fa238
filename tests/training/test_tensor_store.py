"""The store of tensors on disk: what comes back, its bound, damage, full disks, several processes."""

import contextlib
import errno
import multiprocessing
import os

import pytest
import torch

from fastln.errors import FastLNError
from fastln.sizes import parse_bytes
from fastln.training import TensorStore
from fastln.training.tensor_store import INCOMING, LEDGER

BLOCK = 4096


def key(number: int) -> str:
    return f"{number:02x}" * 32


def tensors(number: int, n_bytes: int = 3000) -> dict[str, torch.Tensor]:
    return {"x": torch.full((n_bytes // 2,), number, dtype=torch.bfloat16), "y": torch.tensor(float(number))}


def files(folder):
    return sorted(folder.glob("*/*.safetensors"))


def used(folder) -> int:
    total = 0
    for path in files(folder):
        with contextlib.suppress(FileNotFoundError):  # another process made room
            total += -(-path.stat().st_size // BLOCK) * BLOCK
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_what_is_put_comes_back_bit_for_bit(dtype, tmp_path):
    store = TensorStore(tmp_path, "1MiB")
    given = {"a": torch.randn(3, 5, 7).to(dtype).transpose(0, 2), "b": torch.empty(0, dtype=dtype)}
    assert store.get(key(1)) is None
    store.put(key(1), given)
    for reader in (store, TensorStore(tmp_path, "1MiB")):
        got = reader.get(key(1))
        assert got.keys() == given.keys()
        assert all(torch.equal(got[name], given[name]) and got[name].dtype == dtype for name in given)
    assert store.get(key(2)) is None


def test_the_bound_holds_and_what_was_used_last_stays(tmp_path):
    store = TensorStore(tmp_path, 10 * BLOCK)
    for number in range(10):
        store.put(key(number), tensors(number))
        os.utime(store._path(key(number)), ns=(number, number))
    assert used(tmp_path) == 10 * BLOCK
    assert store.get(key(0)) is not None  # makes it the latest
    store.put(key(10), tensors(10))
    assert used(tmp_path) <= 10 * BLOCK
    assert store.get(key(0)) is not None
    assert store.get(key(10)) is not None
    assert store.get(key(1)) is None
    for number in range(11, 60):
        store.put(key(number), tensors(number))
        assert used(tmp_path) <= 10 * BLOCK
    assert used(tmp_path) >= 8 * BLOCK, "room is made for what is coming, not more"
    TensorStore(tmp_path, 3 * BLOCK)
    assert used(tmp_path) <= 3 * BLOCK, "a lower limit holds from the start"


def test_what_is_larger_than_the_bound_is_not_kept_and_deletes_nothing(tmp_path, caplog):
    store = TensorStore(tmp_path, 2 * BLOCK)
    store.put(key(1), tensors(1))
    store.put(key(2), tensors(2, 5 * BLOCK))
    assert store.get(key(1)) is not None
    assert store.get(key(2)) is None
    assert "the limit is 8,192" in caplog.text


def test_files_of_others_stay(tmp_path):
    (tmp_path / "ab").mkdir()
    mine = [tmp_path / "notes.txt", tmp_path / "ab" / "model.safetensors", tmp_path / "ab" / f"{key(3)}.safetensors"]
    for path in mine:
        path.write_bytes(b"x" * 5 * BLOCK)
    store = TensorStore(tmp_path, 2 * BLOCK)
    for number in range(5):
        store.put(key(number), tensors(number))
    assert all(path.stat().st_size == 5 * BLOCK for path in mine)


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "replaced", "without checksum"])
def test_a_damaged_file_counts_as_absent_and_is_written_again(damage, tmp_path, caplog):
    store = TensorStore(tmp_path, "1MiB")
    store.put(key(1), tensors(1))
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-100] ^= 1
    if damage == "without checksum":
        data = data.replace(b"crc32", b"crc33")
    path.write_bytes({"cut": data[:-1], "emptied": b"", "replaced": b"no tensors"}.get(damage, data))
    assert store.get(key(1)) is None
    assert f"{path}: this file is damaged" in caplog.text
    store.put(key(1), tensors(1))
    assert torch.equal(store.get(key(1))["x"], tensors(1)["x"])


def test_a_full_disk_is_one_warning_and_leaves_nothing_half_written(tmp_path, caplog, monkeypatch):
    store = TensorStore(tmp_path, "1MiB")
    store.put(key(1), tensors(1))

    def full(path, data):
        path.open("wb").write(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    for number in (2, 3):
        store.put(key(number), tensors(number))
        assert store.get(key(number)) is None
    assert caplog.text.count("nothing more is written to this cache: [Errno 28] No space left") == 1
    assert store.get(key(1)) is not None
    assert not (tmp_path / INCOMING).exists()


@pytest.mark.parametrize("ledger", ["", "much", "-3", "99999999999"])
def test_a_ledger_that_is_wrong_is_counted_anew(ledger, tmp_path):
    TensorStore(tmp_path, "1MiB")
    (tmp_path / LEDGER).write_text(ledger)
    store = TensorStore(tmp_path, 4 * BLOCK)
    assert (tmp_path / LEDGER).read_text() == "0"
    (tmp_path / LEDGER).write_text(ledger)
    for number in range(9):
        store.put(key(number), tensors(number))
    assert BLOCK <= used(tmp_path) <= 4 * BLOCK


def write_many(folder, first, n, limit):
    store = TensorStore(folder, limit)
    for number in range(first, first + n):
        store.put(key(number), tensors(number))
        got = store.get(key(number))
        assert got is None or torch.equal(got["x"], tensors(number)["x"])


def test_two_processes_write_at_once_within_the_bound(tmp_path):
    limit = 20 * BLOCK
    context = multiprocessing.get_context("fork")
    # They share half of the keys.
    writers = [context.Process(target=write_many, args=(tmp_path, first, 60, limit)) for first in (0, 30)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert used(tmp_path) <= limit
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert int((tmp_path / LEDGER).read_text()) >= used(tmp_path) > limit // 2
    store = TensorStore(tmp_path, limit)
    for path in files(tmp_path):
        number = int(path.name[:2], 16)
        assert torch.equal(store.get(key(number))["x"], tensors(number)["x"])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500B", 500),
        ("500b", 500),
        (500, 500),
        ("2 kb", 2000),
        ("1.5G", 15 * 10**8),
        ("8gib", 8 << 30),
        ("1Ti", 1 << 40),
    ],
)
def test_sizes_have_units_in_any_case(text, size):
    assert parse_bytes(text) == size


def test_a_folder_that_cannot_be_had_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FastLNError, match="file: cannot be used as a cache"):
        TensorStore(tmp_path / "file", "1GiB")
    with pytest.raises(FastLNError, match="'12 parsecs' is not a valid size; write it like 500MB or 8GiB"):
        TensorStore(tmp_path, "12 parsecs")
    with pytest.raises(FastLNError, match="'0GiB' is not a valid size"):
        TensorStore(tmp_path, "0GiB")

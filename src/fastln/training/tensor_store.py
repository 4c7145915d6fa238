"""A store of tensors on disk under keys, with a size limit; the least recently used are deleted first.

A store is a folder of safetensors files, one per key, in subfolders by the key's first two digits. Several processes
may share a store: files are renamed into place when complete, and the writer holds a lock. A damaged file counts as
absent.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastln.errors import FastLNError
from fastln.files import user_path
from fastln.sizes import parse_bytes

logger = logging.getLogger(__name__)

LEDGER = "size.lock"  # the writer locks it; it holds the bytes in use
INCOMING = "incoming.tmp"
_BLOCK = 4096  # a file's size on disk is a multiple of this
_SHARE_KEPT = 0.9  # of the limit, after freeing space, so that not every further file has to free space again
_KEY = re.compile(r"[0-9a-f]{64}")


LIMIT = "10GiB"


class TensorStore:
    """A bounded folder of tensors under keys.

    If a write fails (a full disk, a folder that became read-only), the store warns once and from then on only reads. A
    file that it cannot read counts as absent.

    Args:
        directory: the folder; created if it is missing. Files in it that are not the store's stay untouched.
        limit: the most that its files may take on disk, in bytes or as "8GiB".

    Raises:
        FastLNError: if the folder cannot be made or written to, or the limit is not a number of bytes.
    """

    def __init__(self, directory: str | Path, limit: str | int) -> None:
        self.directory = user_path(directory)
        self.limit = parse_bytes(limit)
        self._writes = True
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with self._locked() as ledger:
                _write(ledger, self._make_room(0, self.limit))
        except OSError as error:
            raise FastLNError(f"{directory}: cannot be used as a cache: {error}") from error

    @classmethod
    def at(cls, directory: Path | None, limit: str | None) -> TensorStore | None:
        """Return the store in a folder, by default with at most `LIMIT` on disk; None without a folder.

        Raises:
            FastLNError: if there is a limit and no folder; also as for the class.
        """
        if directory is None:
            if limit is not None:
                raise FastLNError(f"feature_cache_size {limit}: there is no feature_cache whose size it limits")
            return None
        return cls(directory, LIMIT if limit is None else limit)

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors under `key`, 64 hexadecimal digits; None if there are none."""
        path = self._path(key)
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                whole = (file.metadata() or {}).get("crc32") == _checksum(tensors)
            if whole:
                os.utime(path)
                return tensors
        except OSError:
            return None
        except SafetensorError:
            pass
        logger.warning("%s: this file is damaged; its tensors will be computed again", path)
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep `tensors` under `key`, 64 hexadecimal digits, if there are none yet."""
        if not self._writes:
            return
        path = self._path(key)
        # Copies: safetensors does not take views of shared memory, such as a pooled row of the hidden states.
        kept = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        data = save(kept, {"crc32": _checksum(kept)})
        size = _on_disk(len(data))
        if size > self.limit:
            self._stop_writing(f"one image's features take {size:,} bytes, and the limit is {self.limit:,}")
            return
        try:
            with self._locked() as ledger:
                if path.exists():
                    return
                used = _read(ledger)
                if used is None or used + size > self.limit:
                    used = self._make_room(size, int(_SHARE_KEPT * self.limit))
                # The ledger first: if this process ends here, the ledger is too high, and the next count corrects it.
                _write(ledger, used + size)
                self._publish(path, data)
        except OSError as error:
            self._stop_writing(str(error))

    def _publish(self, path: Path, data: bytes) -> None:
        incoming = self.directory / INCOMING  # one is enough, because only one process writes at a time
        try:
            incoming.write_bytes(data)
            path.parent.mkdir(exist_ok=True)
            incoming.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                incoming.unlink()
            raise

    def _make_room(self, wanted: int, limit: int) -> int:
        """Delete the least recently used files until `wanted` more bytes fit; return the bytes then in use."""
        files = sorted(self._files())
        used = sum(size for _, _, size in files)
        for _, path, size in files:
            if used + wanted <= limit:
                break
            Path(path).unlink(missing_ok=True)
            used -= size
        return used

    def _files(self) -> Iterator[tuple[int, str, int]]:
        """Yield, for each of the store's files, the time of last use (ns), the path and the size on disk."""
        with os.scandir(self.directory) as folders:
            for folder in [entry for entry in folders if len(entry.name) == 2 and entry.is_dir()]:
                with os.scandir(folder.path) as entries:
                    for entry in entries:
                        name = entry.name.removesuffix(".safetensors")
                        if name != entry.name and _KEY.fullmatch(name) and name.startswith(folder.name):
                            with contextlib.suppress(FileNotFoundError):  # another process found it damaged
                                status = entry.stat()
                                yield status.st_mtime_ns, entry.path, _on_disk(status.st_size)

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"a key is 64 hexadecimal digits, not {key!r}")
        return self.directory / key[:2] / f"{key}.safetensors"

    @contextlib.contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        with (self.directory / LEDGER).open("a+", encoding="utf-8") as ledger:
            fcntl.flock(ledger, fcntl.LOCK_EX)  # until it is closed
            yield ledger

    def _stop_writing(self, reason: str) -> None:
        self._writes = False
        logger.warning("%s: nothing more is written to this cache: %s", self.directory, reason)


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _read(ledger: IO[str]) -> int | None:
    ledger.seek(0)
    text = ledger.read()
    return int(text) if text.isdecimal() else None


def _write(ledger: IO[str], used: int) -> None:
    ledger.truncate(0)
    ledger.write(str(used))  # at the end, which is the beginning
    ledger.flush()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(as_bytes(tensors[name]), total)
    return f"{total:08x}"


def as_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of `tensor`, in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

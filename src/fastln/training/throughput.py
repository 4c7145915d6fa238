"""Measures the samples and tokens per second of a training run, without the time of saving and evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class Throughput:
    """Counts samples and tokens since the last reading, and the seconds of training on them."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin to count."""
        self._since = time.perf_counter()
        self._n_samples = 0
        self._n_tokens: Tensor | int = 0

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Exclude the time within this context."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Count a batch: its rows, and the tokens that its mask does not hide."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        # Pixel values may be patches, with more than one row per sample.
        rows = next(
            (x for x in (ids, inputs.get("labels"), *inputs.values()) if isinstance(x, Tensor) and x.dim()), None
        )
        self._n_samples += 0 if rows is None else len(rows)
        if isinstance(mask, Tensor):
            self._n_tokens = self._n_tokens + mask.count_nonzero()  # stays on its device until it is read
        elif isinstance(ids, Tensor):
            self._n_tokens += ids.numel()

    def read(self, n_processes: int) -> dict[str, float]:
        """Return `samples_per_second` and, for texts, `tokens_per_second` of all processes, and start again.

        Args:
            n_processes: how many train together; each is assumed to have as much work as this one.
        """
        factor = n_processes / (time.perf_counter() - self._since)
        rates = {"samples_per_second": round(self._n_samples * factor, 3)}
        if n_tokens := int(self._n_tokens):
            rates["tokens_per_second"] = round(n_tokens * factor, 1)
        self.restart()
        return rates

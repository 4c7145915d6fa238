"""Where a tensor's rows lie in the memory of all rows, found from a twin on meta with the same shape and strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_basic(index: Any) -> bool:
    """Whether an index gives a view, because it has only integers, slices and dots."""
    return all(type(part) in (int, slice, type(...)) for part in (index if isinstance(index, tuple) else (index,)))


def has_whole_rows(twin: Tensor, d: int) -> bool:
    """Whether the last dimension of `twin`, a view of `(..., d)`, still holds whole rows."""
    is_last = twin.shape[-1:] == (d,) and d > 1 and twin.stride(-1) == 1
    return is_last and not any(stride % d for stride in twin.stride()[:-1])


def row_numbers(twin: Tensor, device: torch.device) -> Tensor:
    """Return the number of each row of `twin` in its memory, `(n,)`."""
    d = twin.shape[-1]
    n_rows = twin.untyped_storage().nbytes() // (twin.itemsize * d)
    strides = [stride // d for stride in twin.stride()[:-1]]
    numbers = torch.arange(n_rows, device=device)
    return numbers.as_strided(twin.shape[:-1], strides, twin.storage_offset() // d).reshape(-1)


def laid_out(rows: Tensor, twin: Tensor) -> Tensor:
    """Return the view of all rows `(n_rows, d)` with the same layout as `twin` in its memory."""
    if twin.is_contiguous() and twin.numel() == rows.numel():
        return rows.view(twin.shape)
    return rows.as_strided(twin.shape, twin.stride(), rows.storage_offset() + twin.storage_offset())

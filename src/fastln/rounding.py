"""Tell what a narrower dtype takes from tuned values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor


def warn_of_rounding(exact: Mapping[str, Tensor], kept: Mapping[str, Tensor], advice: str, stacklevel: int = 3) -> None:
    """Warn if values of `exact` were rounded in `kept`: how many, and by how much.

    Args:
        exact: tensors by name.
        kept: the same names and more, perhaps in other dtypes.
        advice: how to keep the exact values; the end of the warning.
        stacklevel: as `warnings.warn` takes it.
    """
    n_values = n_rounded = 0
    largest = 0.0
    dtypes = set()
    for name, tensor in exact.items():
        before, after = tensor.double().cpu(), kept[name].detach().double().cpu()
        rounded = before != after
        n_values += tensor.numel()
        if rounded.any():
            n_rounded += int(rounded.sum())
            largest = max(largest, float((before - after).abs().max()))
            dtypes.add(str(kept[name].dtype).removeprefix("torch."))
    if n_rounded:
        warnings.warn(
            f"{', '.join(sorted(dtypes))} rounds {n_rounded:,} of {n_values:,} tuned values, by up to {largest:.1e}; "
            f"{advice}",
            stacklevel=stacklevel,
        )

"""Pixels of more than 8 bits as brightness: which values are black and white, and whether 256 levels tell them apart.

A deep picture without a window of its own gets robust limits. Padding (a lowest or highest value farther from all
others than those are from each other) does not count, and neither do single hot pixels. Of the rest, the 0.1 percentile
becomes black and the 99.9 percentile white. The lowest value does not count for white, because background can fill most
of a picture. Colours keep black at 0, so that their hue stays; white is the largest value of 8, 10, 12, 14 or 16 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

ROBUST = "from the 0.1 to the 99.9 percentile, without padding"
"""The rule in words, for the log."""

_TAIL = 0.001
_LEAST_VALUES = 16
"""The fewest different values that can show that another one lies far from them; a mask has two."""

_DEPTHS = (8, 10, 12, 14, 16)
_FEW_LEVELS = 32
_LOOKED_AT = 1 << 18
"""The pixels that are looked at to count levels."""


class Limits(NamedTuple):
    """The values that become black and white."""

    black: float
    white: float

    def brightness(self, values: np.ndarray) -> np.ndarray:
        """Map values to brightness, from 0 to 1; all to 0 if black and white are one value."""
        if not self.white > self.black:
            return np.zeros(values.shape)
        return np.clip((values.astype(np.float64) - self.black) / (self.white - self.black), 0, 1)


def robust_limits(values: np.ndarray) -> Limits:
    """Return the limits of grey values.

    Args:
        values: The values that are picture, without padding and NaN, in any shape; may be empty.
    """
    if not values.size:
        return Limits(0, 0)
    distinct, counts = _without_outliers(*_histogram(values))
    low, high = _lowest(distinct, counts), _highest(distinct[1:], counts[1:])
    if low is None or high is None or low >= high:  # two values, or few pixels that are not background
        return Limits(float(distinct[0]), float(distinct[-1]))
    return Limits(low, high)


def colour_limits(values: np.ndarray, bits: int | None = None) -> Limits:
    """Return the limits of colours: by the stated depth, or else by the least depth that holds nearly all values."""
    if bits is None:
        distinct, counts = _without_outliers(*_histogram(values))
        top = _highest(distinct, counts) or 0
        bits = next((depth for depth in _DEPTHS if top < 1 << depth), _DEPTHS[-1])
    return Limits(0, (1 << bits) - 1)


def to_rgb(brightness: np.ndarray) -> Image.Image:
    """Make an image of mode RGB from brightness, from 0 to 1, (rows, columns) or (rows, columns, 3)."""
    return Image.fromarray(np.rint(brightness * 255).astype(np.uint8)).convert("RGB")


def levels_lost(values: np.ndarray, brightness: np.ndarray) -> str:
    """Say how few grey levels the bulk of a picture fills; empty if it fills enough or has no more values than levels.

    Args:
        values: The values that are picture.
        brightness: Theirs, in the same order.
    """
    if not values.size:
        return ""
    step = -(-values.size // _LOOKED_AT)
    values, levels = values.ravel()[::step], np.rint(brightness.ravel()[::step] * 255)
    low, high = np.quantile(values, 0.01, method="lower"), np.quantile(values, 0.99, method="higher")
    bulk = (values >= low) & (values <= high)
    n_values, n_levels = len(np.unique(values[bulk])), len(np.unique(levels[bulk]))
    if n_levels >= _FEW_LEVELS or n_values < 2 * n_levels:
        return ""
    return f"{n_values:,} different values of it become {n_levels} of 256 levels"


def _histogram(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different values, sorted, and how often each occurs."""
    if values.dtype.kind in "iu":
        values = values.astype(np.int64).ravel()
        low = int(values.min())
        if int(values.max()) - low < 1 << 20:  # faster than sorting
            counts = np.bincount(values - low)
            present = np.flatnonzero(counts)
            return present + low, counts[present]
    return np.unique(values, return_counts=True)


def _without_outliers(distinct: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    while len(distinct) > _LEAST_VALUES:
        highest, lowest = _highest(distinct[1:], counts[1:]), _lowest(distinct[:-1], counts[:-1])
        inner = distinct[-2] - distinct[1]
        if min(distinct[1] - distinct[0], distinct[-1] - distinct[-2]) > inner:  # each would hide the other
            distinct, counts = distinct[1:-1], counts[1:-1]
        elif highest is not None and distinct[1] - distinct[0] > highest - distinct[1]:
            distinct, counts = distinct[1:], counts[1:]
        elif lowest is not None and distinct[-1] - distinct[-2] > distinct[-2] - lowest:
            distinct, counts = distinct[:-1], counts[:-1]
        else:
            break
    return distinct, counts


def _lowest(distinct: np.ndarray, counts: np.ndarray) -> float | None:
    """Return the smallest value that more than a share `_TAIL` of the pixels reaches down to."""
    if not len(distinct):
        return None
    cumulated = np.cumsum(counts)
    return float(distinct[np.searchsorted(cumulated, _TAIL * cumulated[-1], side="right")])


def _highest(distinct: np.ndarray, counts: np.ndarray) -> float | None:
    if not len(distinct):
        return None
    cumulated = np.cumsum(counts[::-1])
    return float(distinct[::-1][np.searchsorted(cumulated, _TAIL * cumulated[-1], side="right")])

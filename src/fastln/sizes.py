"""Parse sizes in bytes, such as "8GiB"."""

from __future__ import annotations

import re

from fastln.errors import FastLNError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(text: str | int) -> int:
    """Parse a size such as "8GiB", "500 mb", "1.5T" or 4096 and return it in bytes.

    Raises:
        FastLNError: If it is not a size, or is less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", str(text).strip())
    unit = _UNITS.get(match[2].upper().removesuffix("B")) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise FastLNError(f"{text!r} is not a valid size; write it like 500MB or 8GiB")
    return size

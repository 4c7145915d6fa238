"""How data is read: its layout and options. Apart from the readers, which are slow to import."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from fastln.errors import FastLNError

LAYOUTS = ("vqa-rad", "slake", "path-vqa", "parquet", "iu-xray", "llava-med", "plain")
"""The names of the layouts that fastln reads."""

_SWITCHES = {"all": True, "true": True, "none": False, "false": False}
_COUNT = re.compile(r"[0-9]+")
_SHARE = re.compile(r"[0-9]+(\.[0-9]+)?%")


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How data is read.

    Attributes:
        layout: Name of the layout, for data that is not recognised or is taken for another; None to recognise it.
        language: Language of the questions, if the data has several: SLAKE's `en` (the default, None) or `zh`.
        skip_bad_rows: Skip bad rows and list them in the log, instead of refusing the data: True or "all", at most a
            number of them (20), or at most a share of all rows ("1%").
        keep_repeats: Keep training rows whose images, question and answer the test or validation split repeats.

    Raises:
        FastLNError: `skip_bad_rows` is none of these.
    """

    layout: str | None = None
    language: str | None = None
    skip_bad_rows: bool | int | str = False
    keep_repeats: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip_bad_rows", skip_limit(self.skip_bad_rows))

    def skips(self, n_bad: int, n_rows: int) -> bool:
        """Whether so many bad rows of so many are skipped; if not, the data is refused."""
        most = self.skip_bad_rows
        if isinstance(most, str):
            return n_bad * 100 <= Fraction(most.removesuffix("%")) * n_rows
        return most is True or n_bad <= most


def is_skip_limit(word: str) -> bool:
    """Whether a word can be the value of `skip_bad_rows`."""
    return word in _SWITCHES or bool(_COUNT.fullmatch(word)) or _is_share(word)


def skip_limit(value: object) -> bool | int | str:
    """Return the value of `skip_bad_rows` in one form: a truth value, a number, or a share as text.

    Raises:
        FastLNError: It is none of these.
    """
    if isinstance(value, bool) or (isinstance(value, int) and value >= 0):
        return value
    if isinstance(value, str) and is_skip_limit(value):
        return _SWITCHES[value] if value in _SWITCHES else int(value) if _COUNT.fullmatch(value) else value
    raise FastLNError(f"skip_bad_rows must be all, a number of rows such as 20, or a share such as 1%, not {value!r}")


def _is_share(word: str) -> bool:
    return bool(_SHARE.fullmatch(word)) and Fraction(word.removesuffix("%")) <= 100

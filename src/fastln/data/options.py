"""The options for reading data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How data is read.

    Attributes:
        layout: Name of the layout, for data that is not recognised or is taken for another; None to recognise it.
        language: Language of the questions, if the data has several: SLAKE's `en` (the default, None) or `zh`.
        skip_bad_rows: Skip bad rows and list them in the log, instead of refusing the data.
    """

    layout: str | None = None
    language: str | None = None
    skip_bad_rows: bool = False

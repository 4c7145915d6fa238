"""How a user may have data read: the options beside its place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How data is read.

    Attributes:
        layout: Name of the layout, for data that is not recognised or taken for another; recognised where None.
        language: Of the questions, for data in several: SLAKE's `en` (which None means) or `zh`.
        skip_bad_rows: Leave bad rows out and list them in the log, rather than refuse the data.
    """

    layout: str | None = None
    language: str | None = None
    skip_bad_rows: bool = False

"""Which rows of a model are on the front of peak memory against step time: no other row is better at both."""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from fastln.bench.results import Row, by_model, contender_of


class Place(NamedTuple):
    """Where a row is.

    Attributes:
        row: The row, which has finished at least one round.
        seconds: Its step time, compared with the other rows' within rounds, so that a slow round slows none of them.
        peak: Its peak memory in bytes.
        better: The place that is most ahead of it, at least as good at both; None if it is on the front.
    """

    row: Row
    seconds: float
    peak: int
    better: "Place | None" = None


def fronts(rows: Sequence[Row]) -> list[tuple[str, list[Place]]]:
    """Return (title, places) for each model and dtype of which some rows differ in what they keep for backward."""
    return [
        (title, places(group))
        for title, group in by_model(rows)
        if any(contender_of(row).has_own_storage for row in group)
    ]


def places(rows: Sequence[Row]) -> list[Place]:
    """Return where the rows of one model are, in their order, without those that failed in the first round."""
    measured = [row for row in rows if row.step_seconds_by_round and row.peak_memory_bytes]
    if not measured:
        return []
    base = max(measured, key=lambda row: len(row.step_seconds_by_round))
    usual = median(base.step_seconds_by_round)
    found = [Place(row, usual * median(times_over(row, base)), row.peak_memory_bytes or 0) for row in measured]
    return [place._replace(better=_better(place, found)) for place in found]


def _better(place: Place, others: Sequence[Place]) -> Place | None:
    ahead = [
        other
        for other in others
        if other.seconds <= place.seconds and other.peak <= place.peak and other[1:3] != place[1:3]
    ]
    return min(ahead, key=lambda other: other.seconds * other.peak, default=None)


def times_over(row: Row, base: Row) -> list[float]:
    """Return how many times as long as `base` a row took, for each round that both finished."""
    return [mine / its for mine, its in zip(row.step_seconds_by_round, base.step_seconds_by_round, strict=False)]

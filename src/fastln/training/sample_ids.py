"""The ids of the samples in a batch, so that an error can name them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

KEY = "fastln_sample_ids"
NAMES = ("id", "sample_id", "question_id", "qid", "uid")


class WithSampleIds:
    """A collator that adds the samples' ids to the batch of another collator.

    Args:
        collate: Makes the batch.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        """Return the batch of `samples`, with their ids under `KEY` if it is a mapping and each sample has an id."""
        ids = [_id_of(sample) for sample in samples]
        batch = self.collate(samples)
        if isinstance(batch, Mapping) and None not in ids:
            batch = {**batch, KEY: ids}
        return batch


def _id_of(sample: Any) -> str | None:
    for name in NAMES:
        value = sample.get(name) if isinstance(sample, Mapping) else getattr(sample, name, None)
        if isinstance(value, str | int):
            return str(value)
    return None

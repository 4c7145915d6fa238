"""Batches of questions about the same images, or with texts of similar length."""

from __future__ import annotations

import random
from collections.abc import Iterator

from torch.utils.data import Sampler

from fastln.data.dataset import VQADataset

_STRETCH = 16  # batches: texts are sorted by length within random stretches of this many


class GroupedBatches(Sampler[list[int]]):
    """Batches of question indices, with up to `questions_per_image` questions on one image next to each other.

    The vision encoder can then run once for all of them, which changes no result. In each epoch, the questions of each
    image are shuffled and cut into groups. The shuffled groups fill the batches in turn; if a group would overfill a
    batch, the batch takes only part of it. Every question comes once per epoch. With one question per image, this is an
    ordinary shuffle. Note that grouping by image makes the batches less independent of each other.

    With `by_length`, the groups of some neighbouring batches are sorted by the length of their texts before they fill
    the batches, and the batches are shuffled. This leaves less padding, which costs as much as text.

    The order depends only on the questions, the seed and the epoch. So a run is resumed by setting the epoch and
    skipping the batches that are already done.

    Args:
        dataset: The questions.
        batch_size: Questions in a batch; the last batch of an epoch may be short.
        seed: Any integer.
        questions_per_image: The largest group.
        drop_last: Leave out a short last batch.
        by_length: Whether texts of similar length come together; the short last batch then has the longest.
    """

    def __init__(
        self,
        dataset: VQADataset,
        batch_size: int,
        *,
        seed: int,
        questions_per_image: int = 1,
        drop_last: bool = False,
        by_length: bool = False,
    ) -> None:
        if batch_size < 1 or questions_per_image < 1:
            raise ValueError(
                f"batch_size and questions_per_image must be at least 1, not {batch_size} and {questions_per_image}"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.questions_per_image = questions_per_image
        self.drop_last = drop_last
        self.epoch = 0
        self._n_questions = len(dataset)
        # In characters, without a tokenizer.
        self._lengths = [sample.n_characters for sample in dataset.samples] if by_length else None
        self._by_image: dict[str, list[int]] = {}
        for index, sample in enumerate(dataset.samples):
            self._by_image.setdefault(sample.image, []).append(index)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self._n_questions, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        # Seeding with a string gives the same numbers in every version of Python and mixes seed and epoch well.
        shuffler = random.Random(f"{self.seed}/{self.epoch}")
        groups = []
        for indices in self._by_image.values():
            order = shuffler.sample(indices, len(indices))
            groups += [order[i : i + self.questions_per_image] for i in range(0, len(order), self.questions_per_image)]
        shuffler.shuffle(groups)
        if self._lengths is not None:
            groups = self._ordered(groups, self._lengths)
        order = [index for group in groups for index in group]
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        if self._lengths is not None:
            n_full = self._n_questions // self.batch_size
            batches[:n_full] = shuffler.sample(batches[:n_full], n_full)
        yield from batches[: len(self)]

    def _ordered(self, groups: list[list[int]], lengths: list[int]) -> list[list[int]]:
        """Order each stretch of groups that fill `_STRETCH` batches by their longest text."""
        ordered: list[list[int]] = []
        stretch: list[list[int]] = []
        for group in groups:
            stretch.append(group)
            if sum(map(len, stretch)) >= _STRETCH * self.batch_size:
                ordered += sorted(stretch, key=lambda group: max(lengths[index] for index in group))
                stretch = []
        return ordered + sorted(stretch, key=lambda group: max(lengths[index] for index in group))

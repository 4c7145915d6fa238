"""Batches in which questions about one image stand together."""

from __future__ import annotations

import random
from collections.abc import Iterator

from torch.utils.data import Sampler

from fastln.data.dataset import VQADataset


class ImageGroupedBatches(Sampler[list[int]]):
    """Indices of questions in batches, with up to `questions_per_image` of one image beside each other.

    The vision encoder can then run once for all of them, which changes no result. Each epoch, the questions of each
    image are shuffled and cut into groups, and the shuffled groups, one after the other, fill the batches; a batch that
    a group would overfill takes only part of it. Every question comes once an epoch. With one question per image this
    is an ordinary shuffle. Note that questions of one image make the batches less independent of each other.

    The order depends on the questions, the seed and the epoch alone, so a run is resumed by setting the epoch and
    leaving out the batches already done.

    Args:
        dataset: The questions.
        batch_size: Questions in a batch; the last batch of an epoch may be short.
        seed: Any integer.
        questions_per_image: The largest group.
        drop_last: Leave out a short last batch.
    """

    def __init__(
        self,
        dataset: VQADataset,
        batch_size: int,
        *,
        seed: int,
        questions_per_image: int = 1,
        drop_last: bool = False,
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
        self._by_image: dict[str, list[int]] = {}
        for index, sample in enumerate(dataset.samples):
            self._by_image.setdefault(sample.image, []).append(index)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self._n_questions, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        # Seeding by text gives the same numbers in every version of Python and mixes seed and epoch well.
        shuffler = random.Random(f"{self.seed}/{self.epoch}")
        groups = []
        for indices in self._by_image.values():
            order = shuffler.sample(indices, len(indices))
            groups += [order[i : i + self.questions_per_image] for i in range(0, len(order), self.questions_per_image)]
        shuffler.shuffle(groups)
        order = [index for group in groups for index in group]
        for batch in range(len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]

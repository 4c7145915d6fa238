"""What every reader makes and every model is fed: samples, and the images that belong to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from PIL import Image
from torch.utils.data import Dataset

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one image.

    Attributes:
        id: Name of the question, unique in its dataset.
        image: Key of the image, to be given to `VQADataset.image`; several samples share one image.
        question: The question; runs of white space are single blanks.
        answer: The answer in the spelling of the data, never empty.
        closed: True where the data calls the question closed (yes/no, or a choice it names), False where open.
    """

    id: str
    image: str
    question: str
    answer: str
    closed: bool


@dataclass(frozen=True, slots=True)
class Source:
    """What a reader hands over: all its splits, and a function that gives an image by its key.

    Attributes:
        name: Shown wherever the data is named.
        synthetic: True where the images are drawn by a program.
        splits: The samples by split, `train` and `test` at least.
        image: Takes a key, gives the image in mode RGB; can be pickled, for worker processes.
    """

    name: str
    synthetic: bool
    splits: Mapping[str, list[Sample]]
    image: Callable[[str], Image.Image]


class VQADataset(Dataset[Sample]):
    """The questions of one split; images are decoded when asked for, each time anew.

    Attributes:
        name: The name of the data.
        split: `train`, `validation` or `test`.
        synthetic: True where the images are drawn by a program.
        samples: The questions, in a fixed order.
    """

    def __init__(self, source: Source, split: str, samples: list[Sample]) -> None:
        self.name = source.name
        self.split = split
        self.synthetic = source.synthetic
        self.samples = samples
        self._image = source.image

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    def image(self, key: str) -> Image.Image:
        """Give the image of a sample.

        Args:
            key: `Sample.image`.

        Returns:
            The image in mode RGB, in its own size.

        Raises:
            FastLNError: The image cannot be decoded, or no sample has this key.
        """
        return self._image(key)

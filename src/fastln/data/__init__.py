"""Questions about images: readers of published datasets, the embedded phantom data, and batching."""

from fastln.data.answers import AnswerVocabulary, normalise_answer
from fastln.data.batching import GroupedBatches
from fastln.data.dataset import Sample, Source, VQADataset, demands, digest
from fastln.data.loading import load_dataset, load_source
from fastln.reading import DataOptions

__all__ = [
    "AnswerVocabulary",
    "DataOptions",
    "GroupedBatches",
    "Sample",
    "Source",
    "VQADataset",
    "demands",
    "digest",
    "load_dataset",
    "load_source",
    "normalise_answer",
]

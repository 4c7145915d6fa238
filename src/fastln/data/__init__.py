"""Questions about images: readers of published datasets, the embedded phantom data, and batching."""

from fastln.data.answers import AnswerVocabulary, normalise_answer
from fastln.data.batching import ImageGroupedBatches
from fastln.data.dataset import Sample, VQADataset
from fastln.data.loading import load_dataset

__all__ = ["AnswerVocabulary", "ImageGroupedBatches", "Sample", "VQADataset", "load_dataset", "normalise_answer"]

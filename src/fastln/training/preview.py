"""Previews a training run before it starts: what trains, what changes, the memory, the first batch."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastln.data import Sample, VQADataset
from fastln.memory import SavedActivations, footprint
from fastln.methods import describe_parameters
from fastln.models import VQATask
from fastln.ops.linear_cross_entropy import IGNORE_INDEX
from fastln.state import prepared
from fastln.training.config import TrainConfig
from fastln.training.optimizer import describe_rates, rates_in_use
from fastln.training.tasks import apply_settings

N_SHOWN = 3
N_SAME = 4


def preview(task: VQATask, data: VQADataset, config: TrainConfig, engine: str | None) -> str:
    """Set up the task's model for the method, run two batches forward, and describe the result in several lines.

    The description shows the first batch. The memory is that of the first epoch's largest batch: the one with the most
    pixels and, among those, the longest texts, with padding. Finding it decodes no image and tokenizes no text.

    Args:
        task: The model; the method's changes remain.
        data: The training questions.
        config: How to train.
        engine: The engine that runs the method; the method's first by default.

    Raises:
        FastLNError: As in training, if the method, the model or the images of these batches do not fit.
    """
    batches = task.batches(data, config.batch_size, seed=config.seed, questions_per_image=config.questions_per_image)
    first, *others = ([data[index] for index in batch] for batch in batches)
    largest = max((first, *others), key=lambda samples: _extent(task, data, samples))
    settings = config.settings(engine)
    model = apply_settings(task, settings, quietly=True).train()  # its table is shown below
    with SavedActivations(model) as saved:
        output = model(**task.collate(largest, data))
    del output
    batch = task.collate(first, data)
    with torch.no_grad():
        loss = model(**batch).loss
    lines = [f"{config.method}: {describe_parameters(model)}"]
    lines += [describe_rates(rates_in_use(model, task.head_under(config.method), config.rates))]
    lines += [_changes(task.model, settings.engine)]
    lines += [_memory(model, saved.bytes, largest)]
    lines += [f"first batch: {len(first)} questions, loss {loss.item():.3f} before training"]
    lines += [f"  images: {task.images}"] if task.images else []
    lines += _arguments(batch)
    lines += [_sample(task, batch, row, sample) for row, sample in enumerate(first[:N_SHOWN])]
    return "\n".join(lines)


def _extent(task: VQATask, data: VQADataset, samples: list[Sample]) -> tuple[int, int]:
    """Return the numbers of pixel values and of characters in a batch, with padding."""
    n_characters = len(samples) * max(sample.n_characters for sample in samples)
    if task.images is None:
        return 0, n_characters
    keys = [key for sample in samples for key in sample.images]
    shapes = [task.images.shape(data.stat(key)) for key in (set(keys) if task.shares_images else keys)]
    return sum(shape.numel() for shape in shapes), n_characters


def _changes(model: nn.Module, engine: str) -> str:
    """Describe what fastln changed in the model, after `apply_method`."""
    done = prepared(model)
    return f"engine {engine}: fastln replaces nothing, the model stays stock" if done is None else done.plan.table()


def _memory(model: nn.Module, saved: int, samples: list[Sample]) -> str:
    n_images = len({image for sample in samples for image in sample.images})
    by = f"stored for backward by the largest batch, {len(samples)} questions on {n_images} image(s) (measured)"
    sizes = footprint(model, saved).describe(by)
    return f"memory, predicted: {sizes}; libraries and intermediate results come on top"


def _arguments(batch: dict[str, Any]) -> list[str]:
    lines = []
    for name, tensor in batch.items():
        if not isinstance(tensor, Tensor):
            lines.append(f"  {name}: {tensor}")
            continue
        span = f", {tensor.min().item():.4g} to {tensor.max().item():.4g}" if tensor.numel() else ""
        lines.append(f"  {name}: {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}{span}")
    return lines


def _sample(task: VQATask, batch: dict[str, Any], row: int, sample: Sample) -> str:
    text = _shortened(task.tokenizer, batch["input_ids"][row].tolist())
    labels = batch["labels"][row]
    learned = repr(task.tokenizer.decode(labels[labels != IGNORE_INDEX])) if labels.dim() else f"answer {labels.item()}"
    return f"  {sample.id}: {sample.question!r} {sample.answer!r}: reads {text!r}, learns {learned}"


def _shortened(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Decode tokens. A long run of one token (of an image, or padding) is written once, with its length."""
    parts: list[str] = []
    waiting: list[int] = []
    for token, run in itertools.groupby(ids):
        count = sum(1 for _ in run)
        if count <= N_SAME:
            waiting += [token] * count
            continue
        parts += [tokenizer.decode(waiting), f"{tokenizer.decode([token])} ({count} times)"]
        waiting = []
    return " ".join(part for part in [*parts, tokenizer.decode(waiting)] if part)

"""What a training run would do, told before it does it: what trains, the memory it takes, its first batch."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fastln.data import Sample, VQADataset
from fastln.memory import SavedActivations
from fastln.methods import describe_parameters
from fastln.models import VQATask
from fastln.ops.linear_cross_entropy import IGNORE_INDEX
from fastln.training.config import TrainConfig
from fastln.training.optimizer import describe_rates
from fastln.training.tasks import apply_method

N_SHOWN = 3
N_SAME = 4
MOMENTS = 8  # bytes a trained parameter: AdamW's two, in float32
MASTER = 4  # bytes a trained parameter of lower precision: its float32 copy


def preview(task: VQATask, data: VQADataset, config: TrainConfig, engine: str | None) -> str:
    """Put the method on the task's model, run two batches forward, and say what came of it, in several lines.

    The first batch is shown, and the memory is that of the first epoch's largest: the one of the most pixels and, of
    those, the longest texts, padding included, which is found without decoding images or making tokens.

    Args:
        task: the model; it stays as the method made it.
        data: the training questions.
        config: how to train.
        engine: who runs the method.

    Raises:
        FastLNError: as training would, for what the method, the model and the images of these batches are.
    """
    batches = task.batches(data, config.batch_size, seed=config.seed, questions_per_image=config.questions_per_image)
    first, *others = ([data[index] for index in batch] for batch in batches)
    largest = max((first, *others), key=lambda samples: _extent(task, data, samples))
    model = apply_method(task, config.method, engine, scope=config.scope, without=config.without or ()).train()
    with SavedActivations(model) as saved:
        output = model(**task.collate(largest, data))
    del output
    batch = task.collate(first, data)
    with torch.no_grad():
        loss = model(**batch).loss
    lines = [f"{config.method}: {describe_parameters(model)}"]
    lines += [describe_rates(model, task.head_under(config.method), config.rates)]
    lines += [_memory(model, saved.bytes, largest)]
    lines += [f"first batch: {len(first)} questions, loss {loss.item():.3f} before training"]
    lines += [f"  images: {task.images}"] if task.images else []
    lines += _arguments(batch)
    lines += [_sample(task, batch, row, sample) for row, sample in enumerate(first[:N_SHOWN])]
    return "\n".join(lines)


def _extent(task: VQATask, data: VQADataset, samples: list[Sample]) -> tuple[int, int]:
    """Return how many pixel values a batch has and how many characters, with its padding."""
    n_characters = len(samples) * max(sample.n_characters for sample in samples)
    if task.images is None:
        return 0, n_characters
    keys = [key for sample in samples for key in sample.images]
    shapes = [task.images.shape(data.stat(key)) for key in (set(keys) if task.shares_images else keys)]
    return sum(shape.numel() for shape in shapes), n_characters


def _memory(model: nn.Module, stored: int, samples: list[Sample]) -> str:
    n_images = len({image for sample in samples for image in sample.images})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = {
        "weights": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "gradients": sum(parameter.nbytes for parameter in trained),
        "optimizer": sum(
            parameter.numel() * (MOMENTS + MASTER * (parameter.dtype != torch.float32)) for parameter in trained
        ),
        f"stored for backward by the largest batch, {len(samples)} questions on {n_images} images (measured)": stored,
    }
    parts = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in sizes.items())
    return (
        f"memory, predicted: {sum(sizes.values()) / 2**20:,.1f} MiB: {parts}; "
        "libraries and intermediate results come on top"
    )


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
    """Decode tokens, with long runs of the same one (an image's, padding) written once and counted."""
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

"""Trains only a task head, on features of frozen towers that are computed once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastln.data import GroupedBatches, VQADataset
from fastln.models.dual_encoder import answer_loss
from fastln.models.dual_task import DualEncoderTask
from fastln.progress import bar
from fastln.training.config import TrainConfig
from fastln.training.evaluate import evaluating
from fastln.training.optimizer import MasterAdamW, cosine_schedule
from fastln.training.progress import check_loss


def train_head(
    task: DualEncoderTask, data: VQADataset, config: TrainConfig, *, epochs: int, progress: bool = False
) -> list[float]:
    """Train only the fusion head. The towers run once over the data, in evaluation mode, and do not change.

    Tuning a pretrained tower under a still random head first damages the tower (Kumar et al., arXiv 2202.10054). And
    while only the head trains, the towers' features are the same in every epoch.

    Args:
        task: the dual encoder.
        data: the training questions.
        config: how to train; the head uses the head's learning rate.
        epochs: passes over the questions, in place of those of `config`.
        progress: whether to show a progress bar on stderr.

    Returns:
        The loss of every step.

    Raises:
        FastLNError: if the loss turns NaN.
    """
    head = task.model.fusion_head
    vision, rows, text, labels = _features(task, data)
    matrices = [parameter for parameter in head.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in head.parameters() if parameter.dim() == 1]
    optimizer = MasterAdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.rates.head,
    )
    batches = GroupedBatches(data, config.batch_size, seed=config.seed)
    schedule = cosine_schedule(optimizer, epochs * len(batches), config.warmup)
    torch.manual_seed(config.seed)
    head.train()
    losses: list[float] = []
    with bar(total=epochs, desc="train the head", unit="epoch", shown=progress) as shown:
        for epoch in range(epochs):
            batches.set_epoch(epoch)
            for indices in batches:
                loss = answer_loss(head(vision[rows[indices]], text[indices]), labels[indices])
                loss.backward()
                nn.utils.clip_grad_norm_(head.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                ids = [data.samples[index].id for index in indices]
                losses.append(check_loss(loss.item(), len(losses) + 1, ids))
            shown.update()
    return losses


def _features(task: DualEncoderTask, data: VQADataset, batch_size: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return vision features per image, each question's row in them, and text features and labels per question."""
    keys = list(dict.fromkeys(sample.image for sample in data.samples))
    row_of = {key: row for row, key in enumerate(keys)}
    vision, text = [], []
    with torch.no_grad(), evaluating(task.model):
        for start in range(0, len(keys), batch_size):
            pixels = task.images(data, keys[start : start + batch_size])
            vision.append(task.model.vision_features(pixels.to(task.device), **task.positions))
        for start in range(0, len(data), batch_size):
            questions = [sample.question for sample in data.samples[start : start + batch_size]]
            text.append(task.model.text_features(**task.tokenize(questions)))
    rows = torch.tensor([row_of[sample.image] for sample in data.samples], device=task.device)
    labels = torch.tensor([task.vocabulary.index(sample.answer) for sample in data.samples], device=task.device)
    return torch.cat(vision), rows, torch.cat(text), labels

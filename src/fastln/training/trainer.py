"""Training one task with one method: transformers' Trainer with our batches and our optimizer."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastln.data import ImageGroupedBatches, VQADataset
from fastln.errors import FastLNError
from fastln.models import VQATask
from fastln.prepare import check_norm_gradients
from fastln.training.optimizer import WEIGHT_DECAY, MasterAdamW, parameter_groups
from fastln.training.progress import ProgressBar


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        method: a name from `fastln.methods.METHODS`; sets the learning rate and its groups.
        epochs: passes over the training questions.
        batch_size: questions per step.
        learning_rate: of the method's own parameters; the method's default where None.
        head_learning_rate: of a task head under the other methods; `HEAD_LEARNING_RATE` where None.
        weight_decay: of matrices; norms and biases never decay.
        warmup: share of the steps over which the rate rises; it then falls to 0 along a cosine.
        max_grad_norm: gradients are scaled down to this norm.
        questions_per_image: how many questions on one image go into a batch together (where there are as many).
        seed: of the batches' order and of dropout.
    """

    method: str = "layernorm"
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    weight_decay: float = WEIGHT_DECAY
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    questions_per_image: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("questions_per_image", 1)):
            if getattr(self, name) < least:
                raise FastLNError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("learning_rate", "head_learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise FastLNError(f"{name} is {value}; it must be greater than 0")


@dataclass(frozen=True)
class TrainResult:
    """What a training run did.

    Attributes:
        losses: the loss of every step (of those that this call took, where a run was resumed).
        seconds: wall-clock time of the training loop.
        steps: optimizer steps.
    """

    losses: list[float]
    seconds: float
    steps: int


class TaskTrainer(Trainer):
    """transformers' Trainer over a `VQATask`: image-grouped batches, float32 optimizer state, gradient check."""

    def __init__(self, task: VQATask, model: nn.Module, data: VQADataset, config: TrainConfig, **kwargs: Any) -> None:
        super().__init__(
            model=model,
            train_dataset=data,
            data_collator=lambda samples: task.collate(samples, data),
            optimizers=(build_optimizer(model, task, config), None),
            **kwargs,
        )
        # Losses are means over a batch; nothing is to be divided by a count of labels.
        self.model_accepts_loss_kwargs = False
        self.config = config

    def get_train_dataloader(self) -> DataLoader:
        """Batch the questions by image."""
        batches = ImageGroupedBatches(
            self.train_dataset,
            self.config.batch_size,
            seed=self.config.seed,
            questions_per_image=self.config.questions_per_image,
        )
        loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take one step; the first one checks that every trained norm has its gradient."""
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == 0:
            check_norm_gradients(self.model)
        return loss


class _StepLog(TrainerCallback):
    """Keeps every step's loss; appends it to a file where there is one; stops at a loss that is no number."""

    def __init__(self, path: Path | None) -> None:
        self.losses: list[float] = []
        self.path = path

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if loss != loss:
            raise FastLNError(f"the loss is not a number at step {state.global_step}; try a lower learning rate")
        self.losses.append(loss)
        if self.path is not None:
            with self.path.open("a") as file:
                row = {"step": state.global_step, "epoch": state.epoch, "loss": loss, "lr": logs.get("learning_rate")}
                file.write(json.dumps(row) + "\n")


def build_optimizer(model: nn.Module, task: VQATask, config: TrainConfig) -> MasterAdamW:
    """Return the optimizer of everything in `model` that trains, at the rates of `config`."""
    groups = parameter_groups(
        model,
        config.method,
        task.head,
        learning_rate=config.learning_rate,
        head_learning_rate=config.head_learning_rate,
        weight_decay=config.weight_decay,
    )
    return MasterAdamW(groups)


def train_task(
    task: VQATask,
    model: nn.Module,
    data: VQADataset,
    config: TrainConfig,
    *,
    checkpoints: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train, from the start or from the last checkpoint.

    Args:
        task: makes the batches.
        model: what `fastln.engines.apply_method` returned for it.
        data: the training questions.
        config: how to train.
        checkpoints: folder for a checkpoint after each epoch (the last is kept) and for `log.jsonl`; none by default.
        resume: continue from the last checkpoint in that folder.
        progress: whether to show a progress bar.

    Raises:
        FastLNError: if a trained norm gets no gradient, the loss turns NaN, or there is no checkpoint to resume from.
    """
    if resume and (checkpoints is None or not any(checkpoints.glob("checkpoint-*"))):
        raise FastLNError(f"{checkpoints}: there is no checkpoint to resume from")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=str(checkpoints or scratch),
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            warmup_steps=config.warmup,
            lr_scheduler_type="cosine",
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            save_strategy="epoch" if checkpoints else "no",
            save_total_limit=1,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=not progress,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=task.device.type == "cpu",
        )
        log = _StepLog(checkpoints / "log.jsonl" if checkpoints else None)
        trainer = TaskTrainer(task, model, data, config, args=arguments, callbacks=[log])
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ in ("ProgressCallback", "PrinterCallback"):
                trainer.remove_callback(callback)
        if progress:
            trainer.add_callback(ProgressBar())
        model.train()
        start = time.perf_counter()
        output = trainer.train(resume_from_checkpoint=resume or None)
        return TrainResult(log.losses, time.perf_counter() - start, output.global_step)

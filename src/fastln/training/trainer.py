"""Training one task with one method: transformers' Trainer with our batches and our optimizer."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from fastln.data import VQADataset
from fastln.engines import check_finishes, save_trained_adapter
from fastln.errors import FastLNError
from fastln.methods import LearningRates, count_parameters, describe_parameters, learning_rates
from fastln.models import Task, VQATask
from fastln.models.dual_task import DualEncoderTask
from fastln.prepare import check_norm_gradients
from fastln.processes import is_first_process
from fastln.training.adalora import AdaLoRASteps
from fastln.training.checkpoints import checkpoints_in
from fastln.training.features import cached_features, check_frozen
from fastln.training.head import train_head
from fastln.training.optimizer import WEIGHT_DECAY, MasterAdamW, cosine_schedule, parameter_groups
from fastln.training.progress import ProgressBar, StepLog, check_loss
from fastln.training.resumable import ResumableTrainer
from fastln.training.sample_ids import KEY, WithSampleIds
from fastln.training.tasks import apply_method, finish
from fastln.training.tensor_store import TensorStore
from fastln.training.watch import NormWatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        method: as `fastln.methods.get_method` takes it; sets the learning rate and its groups.
        scope: the sub-models that the method tunes; None for all.
        epochs: passes over the training questions.
        head_epochs: passes that train a head which starts random, alone and on the frozen towers' features, before
            the method's own epochs; under method `head` they are all there is to train, and `epochs` are added to them.
        batch_size: questions per step.
        learning_rate: of the method's own parameters; the method's default where None.
        head_learning_rate: of a task head under the other methods; `fastln.methods.HEAD_LEARNING_RATE` where None.
        weight_decay: of matrices; norms and biases never decay.
        warmup: share of the steps over which the rate rises; it then falls to 0 along a cosine.
        max_grad_norm: gradients are scaled down to this norm.
        questions_per_image: how many questions on one image go into a batch together (where there are as many), with
            models that have one vision pass for all of them; others get batches of texts of like length.
        seed: of the batches' order and of dropout.
    """

    method: str = "layernorm"
    scope: tuple[str, ...] | None = None
    epochs: int = 15
    head_epochs: int = 3
    batch_size: int = 32
    learning_rate: float | None = None
    head_learning_rate: float | None = None
    weight_decay: float = WEIGHT_DECAY
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    questions_per_image: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("head_epochs", 0), ("batch_size", 1), ("questions_per_image", 1)):
            if getattr(self, name) < least:
                raise FastLNError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 <= self.seed < 2**32:
            raise FastLNError(f"seed is {self.seed}; it must be from 0 to 2**32 - 1")
        for name in ("learning_rate", "head_learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise FastLNError(f"{name} is {value}; it must be greater than 0")
        if not self.weight_decay >= 0:
            raise FastLNError(f"weight_decay is {self.weight_decay}; it must be at least 0")
        if not 0 <= self.warmup <= 1:
            raise FastLNError(f"warmup is {self.warmup}; it is a share of the steps, from 0 to 1")

    @property
    def rates(self) -> LearningRates:
        """The learning rates, the method's where none are given."""
        return learning_rates(self.method, self.learning_rate, self.head_learning_rate)


@dataclass(frozen=True)
class TrainResult:
    """What a training run did.

    Attributes:
        losses: the loss of every step (without those of the head alone, where a run was resumed).
        seconds: wall-clock time of training, of this call.
        trainable_parameters: how many parameters the method trained.
        total_parameters: how many the model has.
    """

    losses: list[float]
    seconds: float
    trainable_parameters: int
    total_parameters: int


class TaskTrainer(ResumableTrainer):
    """transformers' Trainer over a `VQATask`: its batches, float32 optimizer state, gradient check."""

    def __init__(self, task: VQATask, model: nn.Module, data: VQADataset, config: TrainConfig, **kwargs: Any) -> None:
        super().__init__(
            model=model,
            train_dataset=data,
            data_collator=WithSampleIds(lambda samples: task.collate(samples, data)),
            optimizers=(build_optimizer(model, task, config), None),
            **kwargs,
        )
        # Losses are means over a batch; nothing is to be divided by a count of labels.
        self.model_accepts_loss_kwargs = False
        self.config = config
        self.task = task

    def get_train_dataloader(self) -> DataLoader:
        """Return the task's batches."""
        batches = self.task.batches(
            self.train_dataset,
            self.config.batch_size,
            seed=self.config.seed,
            questions_per_image=self.config.questions_per_image,
        )
        loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Make the schedule over the steps that the Trainer counts, of which several processes take fewer."""
        self.lr_scheduler = cosine_schedule(optimizer or self.optimizer, num_training_steps, self.config.warmup)
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take one step; the first one checks that every trained norm has its gradient."""
        ids = inputs.pop(KEY, None)
        loss = super().training_step(model, inputs, *args, **kwargs)
        check_loss(loss.item(), self.state.global_step + 1, ids)
        if self.state.global_step == 0:
            check_norm_gradients(self.model)
        return loss


def build_optimizer(model: nn.Module, task: Task, config: TrainConfig) -> MasterAdamW:
    """Return the optimizer of everything in `model` that trains, at the rates of `config`."""
    head = task.head_under(config.method)
    return MasterAdamW(parameter_groups(model, head, config.rates, weight_decay=config.weight_decay))


def train_task(
    task: VQATask,
    data: VQADataset,
    config: TrainConfig,
    *,
    engine: str | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    features: TensorStore | None = None,
    adapter: Path | None = None,
    adapter_dtype: torch.dtype = torch.float32,
) -> TrainResult:
    """Train a task's model with one method, from the start or from the last checkpoint.

    A dual encoder's head that starts random is trained first, alone; see `fastln.training.head.train_head`. Afterwards
    `task.model` is a stock model with the trained values in it, in its own dtype.

    Args:
        task: the model, and what makes its batches.
        data: the training questions.
        config: how to train.
        engine: who runs the method; the method's first by default.
        checkpoints: folder for a checkpoint after each epoch (the last two stay) and for `log.jsonl`; none by default.
        resume: continue from the last checkpoint in that folder.
        progress: whether to show a progress bar.
        features: keeps what a frozen vision tower gives for each image; None for no caching.
        adapter: folder for what was trained, apart from the base; a line in the log where no adapter can hold it.
        adapter_dtype: of the norms in it.

    Raises:
        FastLNError: if a trained norm gets no gradient, the loss turns NaN, there is no checkpoint to resume from, the
            method trains what cannot become part of the model, or features are to be kept of a vision tower that
            trains.
    """
    if resume and not (checkpoints and checkpoints_in(checkpoints)):
        raise FastLNError(f"{checkpoints}: there is no checkpoint to resume from")
    check_finishes(config.method)
    if features is not None:
        check_frozen(task, config.method, config.scope)
    start = time.perf_counter()
    # The towers of a dual encoder stand still as long as nothing but its head learns.
    head_alone = config.method == "head" and isinstance(task, DualEncoderTask)
    losses: list[float] = []
    if isinstance(task, DualEncoderTask) and (head_alone or (task.random_head and not resume)):
        epochs = config.head_epochs + (config.epochs if head_alone else 0)
        with cached_features(task.vision_tower, features):
            losses = train_head(
                task,
                data,
                epochs=epochs,
                batch_size=config.batch_size,
                learning_rate=config.rates.head,
                weight_decay=config.weight_decay,
                warmup=config.warmup,
                max_grad_norm=config.max_grad_norm,
                seed=config.seed,
                progress=progress,
            )
    _, total = count_parameters(task.model)
    model = apply_method(task, config.method, engine, scope=config.scope)
    trainable, _ = count_parameters(model)
    logger.info("%s: %s", config.method, describe_parameters(model))
    if not head_alone:
        with cached_features(task.vision_tower, features):
            losses += _train_method(task, model, data, config, checkpoints, resume, progress)
    if adapter is not None and is_first_process():
        try:
            save_trained_adapter(model, adapter, adapter_dtype)
        except FastLNError as error:
            if isinstance(error.__cause__, OSError | SafetensorError):
                raise
            logger.info("no adapter, only the whole model: %s", error)
    finish(task, model)
    return TrainResult(losses, time.perf_counter() - start, trainable, total)


def _train_method(
    task: VQATask,
    model: nn.Module,
    data: VQADataset,
    config: TrainConfig,
    checkpoints: Path | None,
    resume: bool,
    progress: bool,
) -> list[float]:
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=str(checkpoints or scratch),
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            save_strategy="epoch" if checkpoints else "no",
            save_total_limit=2,  # one that was damaged since leaves the one before it
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,  # ours shows the same without a line per step
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=task.device.type == "cpu",
        )
        # Several GPUs in one process would split images and questions differently; they are for torchrun.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        log = StepLog(checkpoints / "log.jsonl" if checkpoints else None)
        callbacks: list[TrainerCallback] = [
            log,
            NormWatch(model),
            AdaLoRASteps(),
            *([ProgressBar()] if progress else []),
        ]
        trainer = TaskTrainer(task, model, data, config, args=arguments, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        model.train()
        trainer.train(resume_from_checkpoint=resume or None)
        return log.losses

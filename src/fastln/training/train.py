"""train_task: trains one task's model with one method."""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter

import torch
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from fastln.adapters import NoAdapterError
from fastln.data import VQADataset
from fastln.engines import can_restore, check_finishes, save_trained_adapter
from fastln.errors import FastLNError
from fastln.methods import count_parameters, describe_parameters, norm_parameters
from fastln.models import Task, VQATask, is_bare
from fastln.models.dual_task import DualEncoderTask
from fastln.processes import is_first_process
from fastln.settings import EXACT
from fastln.state import prepared
from fastln.training.checkpoints import checkpoints_in
from fastln.training.config import TrainConfig, TrainFiles, TrainResult
from fastln.training.features import cached_features, check_frozen
from fastln.training.head import train_head
from fastln.training.optimizer import WEIGHT_DECAY, decays, describe_rates, rates_in_use
from fastln.training.progress import ProgressBar, StepLog
from fastln.training.task_trainer import TaskTrainer
from fastln.training.tasks import apply_settings, check_reloads, finish, groups_that_train, reload
from fastln.training.tensor_store import TensorStore

logger = logging.getLogger(__name__)


class OneDeviceArguments(TrainingArguments):
    """TrainingArguments of a process that uses at most one GPU; use torchrun for several.

    Several GPUs in one process would split a batch's images and questions differently.
    """

    @property
    def n_gpu(self) -> int:
        """The number of GPUs that this process uses."""
        return min(super().n_gpu, 1)


def train_task(
    task: VQATask,
    data: VQADataset,
    config: TrainConfig,
    files: TrainFiles | None = None,
    *,
    engine: str | None = None,
    features: TensorStore | None = None,
    progress: bool = True,
) -> TrainResult:
    """Train a task's model with one method, from the start or from the last checkpoint.

    A dual encoder's randomly initialised head first trains alone; see `fastln.training.head.train_head`. Afterwards
    `task.model` is a stock model with the trained values in it, in its own dtype.

    Args:
        task: the model, and what makes its batches.
        data: the training questions.
        config: how to train.
        files: what to keep on disk; None for nothing. If no adapter can hold what the method trains, a line in the log
            says why.
        engine: the engine that runs the method; the method's first by default.
        features: keeps the frozen vision tower's output for each image; None for no caching.
        progress: whether to show a progress bar.

    Raises:
        FastLNError: if the watch over norms raises one, the loss turns NaN, there is no checkpoint to resume from, what
            the method trains cannot become part of the model, a setting of `config` has no effect on this model, or
            `features` is given and the vision tower trains.
    """
    files = files or TrainFiles()
    if files.resume and not (files.checkpoints and checkpoints_in(files.checkpoints)):
        raise FastLNError(f"{files.checkpoints}: there is no checkpoint to resume from")
    check_settings(task, config)
    check_finishes(config.method)
    settings = config.settings(engine)
    check_reloads(task, settings)
    if features is not None:
        check_frozen(task, config.method, config.scope)
    start = time.perf_counter()
    head_epochs, epochs = epochs_of(task, config)
    losses: list[float] = []
    if isinstance(task, DualEncoderTask) and (not epochs or (task.random_head and not files.resume)):
        with cached_features(task.vision_tower, features):
            losses = train_head(task, data, config, epochs=head_epochs, progress=progress)
    _, total = count_parameters(task.model)
    model = apply_settings(task, settings)
    trainable, _ = count_parameters(model)
    logger.info("%s: %s", config.method, describe_parameters(model))
    logger.info("%s", describe_rates(rates_in_use(model, task.head_under(config.method), config.rates)))
    tell_unused(task, data, config, files.adapter_dtype)
    if epochs:
        with cached_features(task.vision_tower, features):
            losses += _train_method(task, model, data, config, files, progress)
    if files.adapter is not None and is_first_process():
        try:
            save_trained_adapter(model, files.adapter, files.adapter_dtype, task.origin)
            if is_bare(task.origin.model or ""):  # no base holds its tokenizer
                task.tokenizer.save_pretrained(files.adapter)
        except NoAdapterError as error:
            logger.info("no adapter, only the whole model: %s", error)
    finish(task, model if can_restore(model) else reload(task, model, settings))
    return TrainResult(losses, time.perf_counter() - start, trainable, total)


def check_settings(task: Task, config: TrainConfig) -> None:
    """Check that each learning rate that is given has an effect.

    Raises:
        FastLNError: if nothing trains at one of them.
    """
    if config.method == "head" and config.head_learning_rate is not None:
        raise FastLNError("method 'head' trains the head at learning_rate; give that in place of head_learning_rate")
    if config.head_learning_rate is not None and not task.random_head:
        raise FastLNError(
            f"head_learning_rate is for a task head that starts random, and {task.name} has none; leave it out"
        )
    groups = groups_that_train(task, config.method, config.scope)
    if config.norm_learning_rate is not None and "norms" not in groups:
        raise FastLNError(
            f"norm_learning_rate is for norms, and method {config.method!r} trains none in {task.name}; leave it out"
        )
    own = {"norms": config.norm_learning_rate, "head": config.head_learning_rate}
    if config.learning_rate is not None and groups and all(own.get(group) is not None for group in groups):
        raise FastLNError(
            f"learning_rate has no effect: all that method {config.method!r} trains in {task.name} has a rate of its "
            "own; leave learning_rate out, or the others"
        )


def tell_unused(task: VQATask, data: VQADataset, config: TrainConfig, adapter_dtype: torch.dtype) -> None:
    """Log which settings with non-default values have no effect on this model, method and data.

    Args:
        task: The model, after `apply_method`.
        data: The training questions.
        config: How to train.
        adapter_dtype: The dtype of the adapter's norms.
    """
    head_epochs, epochs = epochs_of(task, config)
    head = task.head_under(config.method)
    if not head_epochs and config.head_epochs not in (0, TrainConfig.head_epochs):
        logger.warning("head_epochs %d has no effect: no head of %s trains alone", config.head_epochs, task.name)
    if config.questions_per_image not in (1, TrainConfig.questions_per_image):
        why = None
        if not task.shares_images:
            why = f"{task.name} shares no vision pass between questions"
        elif not epochs:
            why = "the towers' features are computed once for all epochs"
        elif max(Counter(sample.image for sample in data.samples).values()) == 1:
            why = f"each image of {data.name} has one question"
        if why:
            logger.warning("questions_per_image %d has no effect: %s", config.questions_per_image, why)
    for name in ("activations", "memory_budget", "products"):
        if not epochs and (value := getattr(config, name)) not in (EXACT, None):
            logger.warning("%s %s has no effect: the head trains on features that exact towers computed", name, value)
    if config.weight_decay not in (0, WEIGHT_DECAY) and not decays(task.model, head):
        logger.warning(
            "weight_decay %g has no effect: method %s trains only norms, biases and other vectors in %s, which never "
            "decay",
            config.weight_decay,
            config.method,
            task.name,
        )
    if adapter_dtype != torch.float32 and not _has_norm_adapter(task.model, head):
        logger.warning(
            "adapter_dtype %s has no effect: no adapter holds the norms of method %s", adapter_dtype, config.method
        )


def _has_norm_adapter(model: nn.Module, head: tuple[str, ...]) -> bool:
    """Whether `save_adapter` can write what trains, and there is a norm in it."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained -= {name for name in trained if name.startswith(tuple(f"{module}." for module in head))}
    return prepared(model) is not None and bool(trained) and trained <= set(norm_parameters(model))


def epochs_of(task: Task, config: TrainConfig) -> tuple[int, int]:
    """Return how many epochs train only the head, and how many then train all that the method trains."""
    if not isinstance(task, DualEncoderTask):
        return 0, config.epochs
    # The towers do not change while only the head trains.
    if config.method == "head":
        return config.head_epochs + config.epochs, 0
    return config.head_epochs if task.random_head else 0, config.epochs


def _train_method(
    task: VQATask, model: nn.Module, data: VQADataset, config: TrainConfig, files: TrainFiles, progress: bool
) -> list[float]:
    """Train with the method, and return the loss of every step."""
    checkpoints = files.checkpoints
    with tempfile.TemporaryDirectory() as scratch:
        arguments = OneDeviceArguments(
            output_dir=str(checkpoints or scratch),
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            max_grad_norm=config.max_grad_norm,
            seed=config.seed,
            save_strategy="epoch" if checkpoints else "no",
            save_total_limit=2,  # if the last one is damaged later, the one before it remains
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,  # our progress bar shows the same, without a line per step
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=task.device.type == "cpu",
        )
        log = StepLog(checkpoints / "log.jsonl" if checkpoints else None)
        bar = ProgressBar()
        callbacks: list[TrainerCallback] = [log, *([bar] if progress else [])]
        trainer = TaskTrainer(task, model, data, config, args=arguments, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        model.train()
        try:
            trainer.train(resume_from_checkpoint=files.resume or None)
        finally:
            bar.close()
        return log.losses

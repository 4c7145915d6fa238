"""MethodTrainer: transformers' Trainer for a model with a tuning method; the base of all our trainers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from fastln.errors import FastLNError
from fastln.memory import peak_bytes
from fastln.training.adalora import AdaLoRASteps, is_adalora
from fastln.training.progress import check_loss, why_not_a_number
from fastln.training.resumable import ResumableTrainer
from fastln.training.sample_ids import KEY, WithSampleIds
from fastln.training.throughput import Throughput
from fastln.watch import NormWatch, check_finite

logger = logging.getLogger(__name__)


class MethodTrainer(ResumableTrainer):
    """A Trainer that monitors the training of a method.

    It watches the norms as `fastln.watch_norms` does. It stops with a `FastLNError` if a trained norm gets gradients
    and does not move, if no norm gets any, if one becomes NaN, or if the loss is NaN. If one of several processes
    stops, all do.
    It updates AdaLoRA's ranks. Its log has the mean |Δγ|, samples and tokens per second, and the peak memory.
    Activation checkpointing is not reentrant, as in every prepared model.

    Args:
        *args: As the Trainer takes them.
        **kwargs: As the Trainer takes them.
    """

    data_collator: Any
    model: Any
    _without: tuple[str, ...] = ()  # names of what `fastln.prepare` leaves out

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._watch: NormWatch | None = None
        self._throughput = Throughput()
        super().__init__(*args, **kwargs)
        if self.args.activation_checkpointing and "checkpointing" not in self._without:
            given = dict(self.args.activation_checkpointing_kwargs or {})
            if given.get("use_reentrant"):
                logger.info("checkpoints are without reentry: reentrant ones give no gradient behind frozen layers")
            given["use_reentrant"] = False
            self.args.activation_checkpointing_kwargs = given

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as in `ResumableTrainer.train`.

        Raises:
            FastLNError: As in that method; and if the dataset has no sample.
        """
        if isinstance(self.train_dataset, Sized) and not len(self.train_dataset):
            raise FastLNError("train_dataset holds no sample; look at what filtered or read it")
        self._throughput.restart()
        result = super().train(*args, **kwargs)
        if self._watch is not None:
            self._watch.finish()
        return result

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run one batch forward and backward.

        Raises:
            FastLNError: if the loss is NaN. The message says why, if the batch shows it.
        """
        ids = inputs.pop(KEY, None)
        self._throughput.count(inputs)
        batch = dict(inputs)  # label smoothing takes the labels out
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._check_loss(loss, batch, ids)
        return loss

    def _check_loss(self, loss: Tensor, inputs: Mapping[str, Any], sample_ids: Sequence[str] | None) -> None:
        # All processes check: if only one stopped, the others would wait for it.
        if not self.accelerator.reduce(torch.isnan(loss).float(), "sum"):
            return
        step = self.state.global_step + 1
        if self._watch is not None:
            check_finite(self._watch.began_finite, step)
        check_loss(loss.item(), step, sample_ids, why_not_a_number(inputs))
        raise FastLNError(f"the loss is not a number at step {step} in the batch of another process")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; for training steps also how far γ moved, the throughput since the last log and the peak memory.

        The time of saving and evaluation does not count.
        """
        if "loss" in logs:
            if self._watch is not None:
                check_finite(self._watch.parameters, self.state.global_step)
                shift = self._watch.gamma_shift()
                logs |= {} if shift is None else {"gamma_shift": shift}
            logs |= self._throughput.read(self.args.world_size)
            logs["peak_memory_mib"] = round(peak_bytes(self.args.device) / 2**20, 1)
        super().log(logs, start_time)

    @property
    def _shows_norms(self) -> bool:
        """Whether norms keep separate parameters; DeepSpeed and FSDP1 merge them into others."""
        return not self._sharded or self.accelerator.is_fsdp2

    def _begin_watch(self) -> None:
        if self._watch is None and self._shows_norms:
            self._watch = NormWatch(self.model)

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # How far norms moved counts from the model as it was passed in, before and after an interruption.
        self._begin_watch()
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if is_adalora(self.model) and not any(isinstance(c, AdaLoRASteps) for c in self.callback_handler.callbacks):
            self.add_callback(AdaLoRASteps())
        # Not before: with `cpu_ram_efficient_loading`, only the first process has the values until they are sharded.
        self._begin_watch()
        if self._watch is not None:
            optimizer: Any = self.optimizer
            self._watch.attach(getattr(optimizer, "optimizer", optimizer))  # accelerate wraps it
        return prepared

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._throughput.stopped():
            super()._save_checkpoint(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._throughput.stopped():
            return super()._evaluate(*args, **kwargs)

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> DataLoader:
        # Batches of an iterable dataset may be assembled from those of other processes, only as tensors.
        if not kwargs.get("is_training") or isinstance(dataset, IterableDataset):
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        collator = self.data_collator
        self.data_collator = WithSampleIds(super()._get_collator_with_removed_columns(collator, description))
        try:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.data_collator = collator

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        if isinstance(data_collator, WithSampleIds):  # removes the columns itself, after reading the ids
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)

"""FastLNTrainer: transformers' Trainer that puts a method on the model and watches over it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

from fastln.engines import put_method
from fastln.errors import FastLNError
from fastln.families import find_norms
from fastln.memory import peak_bytes
from fastln.methods import describe_parameters
from fastln.prepare import check_norm_gradients
from fastln.training.adalora import AdaLoRASteps
from fastln.training.progress import check_loss
from fastln.training.resumable import ResumableTrainer
from fastln.training.sample_ids import KEY, WithSampleIds
from fastln.training.watch import NormWatch, check_finite

logger = logging.getLogger(__name__)


class FastLNTrainer(ResumableTrainer):
    """transformers' Trainer for a method of fastln: every argument of the Trainer's, and these.

    The model is prepared in place (peft's methods wrap it: `trainer.model` is what trains). Norms train in float32, at
    a rate of their own where they are given one, and without weight decay, as biases do. Training stops with a
    `FastLNError` where a trained norm gets no gradient, stays put or turns NaN, and where the loss is NaN. The log has
    the mean |Δγ|, samples and tokens a second, and the peak memory. Checkpoints are `ResumableTrainer`'s. Activation
    checkpointing is without reentry whatever `use_reentrant` says, as in every prepared model.

    Args:
        model: As for the Trainer.
        args: As for the Trainer.
        *others: As for the Trainer.
        method: What trains: a name from `fastln.methods.METHODS`, or a code for each sub-model (`LN-F-T`).
        scope: The sub-models to tune, all by default.
        also: Names of further modules that train whole, such as a task head that starts random.
        engine: Who runs the method; its first by default.
        backend: Of fastln's operations.
        norm_learning_rate: Of trained norms; `args.learning_rate` by default.
        **kwargs: As for the Trainer.

    Raises:
        FastLNError: As `fastln.prepare` does; and for a norm_learning_rate that is not positive.
    """

    data_collator: Any
    model: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *others: Any,
        method: str = "layernorm",
        scope: str | Iterable[str] | None = None,
        also: str | Iterable[str] = (),
        engine: str | None = None,
        backend: str = "auto",
        norm_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        if norm_learning_rate is not None and not norm_learning_rate > 0:
            raise FastLNError(f"norm_learning_rate is {norm_learning_rate}; it must be greater than 0")
        self.norm_learning_rate = norm_learning_rate
        self._method: dict[str, Any] = {
            "method": method,
            "scope": scope,
            "also": also,
            "engine": engine,
            "backend": backend,
        }
        self._watch: NormWatch | None = None
        self._since = time.perf_counter()
        self._n_samples = 0
        self._n_tokens: Tensor | int = 0
        super().__init__(model, args, *others, **kwargs)
        if self.args.activation_checkpointing:
            given = dict(self.args.activation_checkpointing_kwargs or {})
            if given.get("use_reentrant"):
                logger.info("checkpoints are without reentry: reentrant ones give no gradient behind frozen layers")
            given["use_reentrant"] = False
            self.args.activation_checkpointing_kwargs = given
        self.add_callback(AdaLoRASteps())
        if self.model_init is None:
            # After the Trainer moved it to its device, which decides on the backends.
            self.model = self.model_wrapped = self.callback_handler.model = self._put(self.model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make the model, and put the method on it."""
        model = super().call_model_init(trial)
        return self._put(model if self._sharded else model.to(self.args.device))

    def _put(self, model: nn.Module) -> nn.Module:
        model = put_method(model, **self._method)
        if self._watch is not None:
            self.remove_callback(self._watch)
            self._watch = None
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as `ResumableTrainer.train` does.

        Raises:
            FastLNError: As that does; and for a dataset without a sample.
        """
        if isinstance(self.train_dataset, Sized) and not len(self.train_dataset):
            raise FastLNError("train_dataset holds no sample; look at what filtered or read it")
        self._since = time.perf_counter()
        return super().train(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # What the norms moved is told from the model as it was given, before and after an interruption.
        self._begin_watch()
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_world_process_zero():
            print(f"{self._method['method']}: {describe_parameters(self.model)}")
        prepared = super()._prepare_for_training(*args, **kwargs)
        # Not before: with `cpu_ram_efficient_loading` the first process alone has the values until they are sharded.
        self._begin_watch()
        return prepared

    @property
    def _shows_norms(self) -> bool:
        """Whether norms keep parameters of their own; DeepSpeed and the first FSDP put them into others."""
        return not self._sharded or self.accelerator.is_fsdp2

    def _begin_watch(self) -> None:
        if self._watch is None and self._shows_norms:
            self._watch = NormWatch(self.model)
            self.add_callback(self._watch)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._clock_stopped():
            super()._save_checkpoint(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock_stopped():
            return super()._evaluate(*args, **kwargs)

    @contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that decay: matrices that are no norm's."""
        norms = {id(parameter) for _, norm in find_norms(model) for parameter in norm.parameters(recurse=False)}
        return [name for name, p in model.named_parameters() if p.dim() > 1 and id(p) not in norms]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the Trainer's optimizer; norms become groups of their own where they have a rate of their own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.norm_learning_rate is not None:
            norms = {
                id(parameter)
                for _, norm in find_norms(model or self.model)
                for parameter in norm.parameters(recurse=False)
            }
            groups = []
            for group in optimizer.param_groups:
                own = [parameter for parameter in group["params"] if id(parameter) in norms]
                others = [parameter for parameter in group["params"] if id(parameter) not in norms]
                if others:
                    groups.append({**group, "params": others})
                if own:
                    groups.append({**group, "params": own, "lr": self.norm_learning_rate})
            optimizer.param_groups[:] = groups
        return optimizer

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> DataLoader:
        # Batches of an iterable dataset may be put together from other processes', as tensors alone.
        if not kwargs.get("is_training") or isinstance(dataset, IterableDataset):
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        collator = self.data_collator
        self.data_collator = WithSampleIds(super()._get_collator_with_removed_columns(collator, description))
        try:
            return super()._get_dataloader(dataset, description, *args, **kwargs)
        finally:
            self.data_collator = collator

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        if isinstance(data_collator, WithSampleIds):  # removes them itself, after it has read the ids
            return data_collator
        return super()._get_collator_with_removed_columns(data_collator, description)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Take one batch forward and backward.

        Raises:
            FastLNError: where the loss is NaN, and where a trained norm gets no gradient in the first step.
        """
        ids = inputs.pop(KEY, None)
        self._count(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)
        # One process that stopped alone would leave the others waiting for it.
        if self.accelerator.reduce(torch.isnan(loss).float(), "sum"):
            step = self.state.global_step + 1
            if self._watch is not None:
                check_finite(self._watch.parameters, step)
            check_loss(loss.item(), step, ids)
            raise FastLNError(f"the loss is not a number at step {step} in the batch of another process")
        # Before the last batch of a step FSDP2 keeps gradients apart from the parameters.
        if self.state.global_step == 0 and self._shows_norms and self.accelerator.sync_gradients:
            check_norm_gradients(self.model)
        return loss

    def _count(self, inputs: dict[str, Any]) -> None:
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        # Pixel values may come as patches, more than one row a sample.
        rows = next(
            (x for x in (ids, inputs.get("labels"), *inputs.values()) if isinstance(x, Tensor) and x.dim()), None
        )
        self._n_samples += 0 if rows is None else len(rows)
        if isinstance(mask, Tensor):
            self._n_tokens = self._n_tokens + mask.count_nonzero()  # stays on its device until it is logged
        elif isinstance(ids, Tensor):
            self._n_tokens += ids.numel()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; for training steps also how far γ moved, the throughput since the last time and the peak memory.

        The time of saving and evaluation does not count.
        """
        if "loss" in logs:
            if self._watch is not None:
                check_finite(self._watch.parameters, self.state.global_step)
                shift = self._watch.gamma_shift()
                logs |= {} if shift is None else {"gamma_shift": shift}
            seconds = time.perf_counter() - self._since
            # The other processes' share is taken to be as large as this one's.
            factor = self.args.world_size / seconds
            logs["samples_per_second"] = round(self._n_samples * factor, 3)
            if n_tokens := int(self._n_tokens):
                logs["tokens_per_second"] = round(n_tokens * factor, 1)
            logs["peak_memory_mib"] = round(peak_bytes(self.args.device) / 2**20, 1)
            self._since, self._n_samples, self._n_tokens = time.perf_counter(), 0, 0
        super().log(logs, start_time)

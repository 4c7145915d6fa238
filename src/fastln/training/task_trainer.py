"""TaskTrainer: our trainer, with a task's batches and a float32 optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from fastln.data import VQADataset, demands
from fastln.models import Task, VQATask
from fastln.training.config import TrainConfig
from fastln.training.method_trainer import MethodTrainer
from fastln.training.optimizer import MasterAdamW, cosine_schedule, parameter_groups
from fastln.training.sample_ids import WithSampleIds


class TaskTrainer(MethodTrainer):
    """The trainer of a `VQATask`: the task's batches, float32 optimizer state, a cosine schedule.

    Args:
        task: makes the batches.
        model: the module to train: the task's model after `apply_method`, or peft's wrapper of it.
        data: the training questions.
        config: how to train.
        **kwargs: as transformers' Trainer takes them.
    """

    def __init__(self, task: VQATask, model: nn.Module, data: VQADataset, config: TrainConfig, **kwargs: Any) -> None:
        self._without = tuple(config.without or ())
        super().__init__(
            model=model,
            train_dataset=data,
            data_collator=WithSampleIds(lambda samples: task.collate(samples, data)),
            optimizers=(build_optimizer(model, task, config), None),
            **kwargs,
        )
        # Losses are means over a batch, so the Trainer must not divide them by the number of labels.
        self.model_accepts_loss_kwargs = False
        self.config = config
        self.task = task
        self._mixed = {"images", "questions without an image"} <= demands(data.samples)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss; a batch without images gives what reads images a gradient of 0, not none."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self._reaches_all(inputs) or not isinstance(loss, Tensor):
            return loss
        return loss + 0 * sum(parameter.sum() for parameter in model.parameters() if parameter.requires_grad)

    def _reaches_all(self, inputs: dict[str, Any]) -> bool:
        """Whether the loss of a batch depends on everything that trains; rows without images do not reach a tower."""
        return not self._mixed or "pixel_values" in inputs

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
        """Make the schedule over the Trainer's number of steps, which is lower with several processes."""
        self.lr_scheduler = cosine_schedule(optimizer or self.optimizer, num_training_steps, self.config.warmup)
        return self.lr_scheduler


def build_optimizer(model: nn.Module, task: Task, config: TrainConfig) -> MasterAdamW:
    """Return the optimizer of all trained parameters in `model`, at the rates of `config`."""
    head = task.head_under(config.method)
    return MasterAdamW(parameter_groups(model, head, config.rates, weight_decay=config.weight_decay))

"""Settings of a training run, what it keeps on disk, and its result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fastln.errors import FastLNError
from fastln.files import user_path
from fastln.methods import LearningRates, learning_rates
from fastln.settings import EXACT, MethodSettings
from fastln.training.optimizer import WEIGHT_DECAY


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        method: as `fastln.methods.get_method` takes it; it determines the learning rates and their groups.
        scope: the sub-models that the method tunes; None for all.
        without: names of what `fastln.prepare` leaves out; None for nothing. This and the next three are for engine
            `fastln` only.
        activations: as `fastln.prepare` takes it.
        memory_budget: as `fastln.prepare` takes it; the first batch decides.
        products: as `fastln.prepare` takes it.
        keep_weights: as `fastln.prepare` takes it. Otherwise the base is loaded again at the end, to be scored and
            saved.
        epochs: passes over the training questions.
        head_epochs: passes that train only a randomly initialised head, on the frozen towers' features, before the
            method's own epochs. Method `head` trains nothing else, for `head_epochs` plus `epochs`.
        batch_size: questions per step.
        learning_rate: the rate of everything that trains, unless one of the next two is given. None: each group of
            parameters has its default, as `fastln.methods.learning_rates` describes.
        norm_learning_rate: the rate of norms.
        head_learning_rate: the rate of a randomly initialised task head, for methods other than `head`.
        weight_decay: weight decay of matrices; norms and biases never decay.
        warmup: fraction of the steps over which the rate rises; it then falls to 0 along a cosine.
        max_grad_norm: gradients are scaled down to this norm.
        questions_per_image: how many questions on one image a batch takes together, if there are as many, for models
            that run the vision tower once for all of them. Other models get batches of texts of similar length.
        seed: seed for the order of the batches and for dropout.
    """

    method: str = "layernorm"
    scope: tuple[str, ...] | None = None
    without: tuple[str, ...] | None = None
    activations: str = EXACT
    memory_budget: float | str | None = None
    products: str = EXACT
    keep_weights: bool = False
    epochs: int = 15
    head_epochs: int = 3
    batch_size: int = 32
    learning_rate: float | None = None
    norm_learning_rate: float | None = None
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
        for name in ("learning_rate", "norm_learning_rate", "head_learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise FastLNError(f"{name} is {value}; it must be greater than 0")
        if not self.weight_decay >= 0:
            raise FastLNError(f"weight_decay is {self.weight_decay}; it must be at least 0")
        if not 0 <= self.warmup <= 1:
            raise FastLNError(f"warmup is {self.warmup}; it is a share of the steps, from 0 to 1")

    def settings(self, engine: str | None = None) -> MethodSettings:
        """Return what the model is set up with, without the task's head.

        Args:
            engine: the engine that runs the method; the method's first by default.

        Raises:
            FastLNError: as in `fastln.engines.put_method`, as far as that needs no model.
        """
        return MethodSettings.of(
            self.method,
            engine,
            scope=self.scope,
            without=self.without or (),
            activations=self.activations,
            memory_budget=self.memory_budget,
            products=self.products,
            keep_weights=self.keep_weights,
        )

    @property
    def rates(self) -> LearningRates:
        """The learning rates: the method's defaults if none are given."""
        return learning_rates(
            self.method, self.learning_rate, norms=self.norm_learning_rate, head=self.head_learning_rate
        )


@dataclass(frozen=True)
class TrainFiles:
    """What a training run keeps on disk: nothing by default.

    Attributes:
        checkpoints: folder for a checkpoint after each epoch (the last two stay) and for `log.jsonl`.
        resume: continue from the last complete checkpoint in that folder.
        adapter: folder for what was trained, without the base.
        adapter_dtype: dtype of the norms in the adapter.
    """

    checkpoints: Path | None = None
    resume: bool = False
    adapter: Path | None = None
    adapter_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("checkpoints", "adapter"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, user_path(path))


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run.

    Attributes:
        losses: the loss of every step (for a resumed run, without the steps that trained only the head).
        seconds: wall-clock time of this call.
        trainable_parameters: how many parameters the method trained.
        total_parameters: how many the model has.
    """

    losses: list[float]
    seconds: float
    trainable_parameters: int
    total_parameters: int

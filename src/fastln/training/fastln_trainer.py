"""FastLNTrainer: a drop-in for transformers' Trainer that sets up a tuning method and monitors its training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from fastln.engines import put_method
from fastln.errors import FastLNError
from fastln.methods import describe_parameters, norm_parameters
from fastln.plan import settle_without
from fastln.training.method_trainer import MethodTrainer


class FastLNTrainer(MethodTrainer):
    """transformers' Trainer for fastln's methods; it takes all of the Trainer's arguments and these.

    The model is prepared in place (peft's methods wrap it: `trainer.model` is what trains). Norms train in float32,
    without weight decay (like biases), and at `norm_learning_rate` if that is given. Training stops with a
    `FastLNError` where `fastln.watch_norms` raises one, and at a loss that is NaN. The log has
    the mean |Δγ|, samples and tokens per second, and the peak memory. Checkpoints are those of `ResumableTrainer`.
    Activation checkpointing is never reentrant, even if `use_reentrant` asks for it, as in every prepared model.

    Args:
        model: As for the Trainer.
        args: As for the Trainer.
        *others: As for the Trainer.
        method: What trains: a name from `fastln.methods.METHODS`, or one code per sub-model (`LN-F-T`).
        scope: The sub-models to tune, all by default.
        also: Names of further modules that train in full, such as a randomly initialised task head.
        engine: The engine that runs the method; its first by default.
        backend: The backend of fastln's operations.
        without: What `fastln.prepare` leaves out.
        norm_learning_rate: The rate of trained norms; `args.learning_rate` by default.
        **kwargs: As for the Trainer.

    Raises:
        FastLNError: As in `fastln.prepare`; and if norm_learning_rate is not positive, no norm trains, or you pass your
            own optimizer with it.
    """

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
        without: str | Iterable[str] = (),
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
        if without:
            self._method["without"] = self._without = settle_without(without)
        super().__init__(model, args, *others, **kwargs)

    def _validate_args(self) -> None:
        super()._validate_args()
        if self.norm_learning_rate is not None and self.optimizer is not None:
            raise FastLNError(
                "norm_learning_rate has no effect on an optimizer of your own: give the norms "
                "(fastln.methods.norm_parameters names them) a parameter group with that rate, or leave the optimizer "
                "out"
            )
        if self.model_init is None:
            # The Trainer has moved the model to its device, which determines the backends, and has not yet shown it to
            # any callback.
            self.model = self.model_wrapped = self._put(self.model)

    @property
    def _method_arguments(self) -> dict[str, Any]:
        scope, also = self._method["scope"], self._method["also"]
        return {
            "method": self._method["method"],
            "engine": self._method["engine"],
            "scope": scope if scope is None or isinstance(scope, str) else list(scope),
            "also": [also] if isinstance(also, str) else list(also),
        }

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make the model, and set it up for the method."""
        model = super().call_model_init(trial)
        return self._put(model if self._sharded else model.to(self.args.device))

    def _put(self, model: nn.Module) -> nn.Module:
        model = put_method(model, **self._method)
        if self.norm_learning_rate is not None and not any(p.requires_grad for p in _norms(model)):
            raise FastLNError(f"method {self._method['method']!r} trains no norm here; leave norm_learning_rate out")
        self._end_watch()
        self._frozen = None
        return model

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_world_process_zero():
            print(f"{self._method['method']}: {describe_parameters(self.model)}")
        return super()._prepare_for_training(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that decay: matrices outside norms."""
        norms = set(norm_parameters(model))
        return [name for name, p in model.named_parameters() if p.dim() > 1 and name not in norms]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the Trainer's optimizer; norms get separate groups if they have a separate rate.

        Raises:
            FastLNError: if they have a separate rate and the optimizer has no norm in its parameter groups.
        """
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.norm_learning_rate is not None:
            _set_rate(optimizer, _norms(model or self.model), self.norm_learning_rate)
        return optimizer


def _norms(model: nn.Module) -> list[nn.Parameter]:
    names = set(norm_parameters(model))
    return [parameter for name, parameter in model.named_parameters() if name in names]


def _set_rate(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], rate: float) -> None:
    """Move those of `parameters` that an optimizer has to separate groups, at that rate."""
    chosen = {id(parameter) for parameter in parameters}
    groups, n_moved = [], 0
    for group in optimizer.param_groups:
        own = [parameter for parameter in group["params"] if id(parameter) in chosen]
        others = [parameter for parameter in group["params"] if id(parameter) not in chosen]
        if others:
            groups.append({**group, "params": others})
        if own:
            groups.append({**group, "params": own, "lr": rate})
            n_moved += len(own)
    if not n_moved:
        raise FastLNError(
            f"norm_learning_rate has no effect on {type(optimizer).__name__}, whose parameter groups hold no norm; "
            "choose another `optim`, or leave norm_learning_rate out"
        )
    optimizer.param_groups[:] = groups

"""FastLNTrainer: a drop-in for transformers' Trainer that sets up a tuning method and monitors its training."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from fastln.errors import FastLNError
from fastln.methods import describe_parameters, norm_parameters
from fastln.settings import MethodSettings
from fastln.state import prepared
from fastln.training.again import put_again
from fastln.training.method_trainer import MethodTrainer
from fastln.training.optimizer import MasterAdamW

logger = logging.getLogger(__name__)


class FastLNTrainer(MethodTrainer):
    """transformers' Trainer for fastln's methods; it takes all of the Trainer's arguments and these.

    The model is prepared in place (peft's methods wrap it: `trainer.model` is what trains). Norms train in float32,
    without weight decay (like biases), and at `norm_learning_rate` if that is given. Training stops with a
    `FastLNError` where `fastln.watch_norms` raises one, and at a loss that is NaN. The log has
    the mean |Δγ|, samples and tokens per second, and the peak memory. Checkpoints are those of `ResumableTrainer`.
    Activation checkpointing is never reentrant, even if `use_reentrant` asks for it, as in every prepared model.

    A head that was not in the model's checkpoint trains with every method. A model that has a method already, as in a
    notebook's cell that ran twice, goes on with it, or gets the new one in its place. If parameters train in 16 bits,
    the Trainer's own AdamW (`adamw_torch`, `adamw_torch_fused`) keeps float32 copies of them.

    Args:
        model: As for the Trainer.
        args: As for the Trainer.
        *others: As for the Trainer.
        method: What trains: a name from `fastln.methods.METHODS`, or one code per sub-model (`LN-F-T`).
        scope: The sub-models to tune, all by default.
        also: Names of further modules that train in full.
        engine: The engine that runs the method; its first by default.
        backend: The backend of fastln's operations.
        without: What `fastln.prepare` leaves out; `random_heads` for every engine.
        activations: As for `fastln.prepare`.
        memory_budget: As for `fastln.prepare`; the first batch decides.
        products: As for `fastln.prepare`.
        keep_weights: As for `fastln.prepare`. Without the model's own weights, `save_model` writes what it writes into
            checkpoints, which `fastln merge` joins with the base.
        norm_learning_rate: The rate of trained norms; `args.learning_rate` by default.
        **kwargs: As for the Trainer.

    Raises:
        FastLNError: As in `fastln.prepare`; and if norm_learning_rate is not positive, no norm trains, or you pass your
            own optimizer with it. Training raises it if the optimizer does not use norm_learning_rate.
    """

    optimizer: Any

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
        activations: str = "exact",
        memory_budget: float | str | None = None,
        products: str = "exact",
        keep_weights: bool = False,
        norm_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        if norm_learning_rate is not None and not norm_learning_rate > 0:
            raise FastLNError(f"norm_learning_rate is {norm_learning_rate}; it must be greater than 0")
        self.norm_learning_rate = norm_learning_rate
        self._made: torch.optim.Optimizer | None = None
        self._settings = MethodSettings.of(
            method,
            engine,
            scope=scope,
            also=also,
            without=without,
            backend=backend,
            activations=activations,
            memory_budget=memory_budget,
            products=products,
            keep_weights=keep_weights,
        )
        self._without = self._settings.without
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
        settings, also = self._settings, self._settings.also
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if (state := prepared(model)) is not None:
            also = state.plan.also  # with new heads, which another load of the base may not show
        scope = settings.scope
        return {
            "method": settings.method,
            "engine": settings.engine,
            "scope": list(scope) if isinstance(scope, tuple) else scope,
            "also": list(also),
        }

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make the model, and set it up for the method."""
        model = super().call_model_init(trial)
        return self._put(model if self._sharded else model.to(self.args.device))

    def _put(self, model: nn.Module) -> nn.Module:
        model = put_again(model, self._settings)
        if self.norm_learning_rate is not None and not any(p.requires_grad for p in _norms(model)):
            raise FastLNError(f"method {self._settings.method!r} trains no norm here; leave norm_learning_rate out")
        self._end_watch()
        self._frozen = None
        return model

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_world_process_zero():
            print(f"{self._settings.method}: {describe_parameters(self.model)}")
        done = super()._prepare_for_training(*args, **kwargs)
        self._check_norm_rate()
        return done

    def _check_norm_rate(self) -> None:
        """Check that norms have their own rate if one was asked for, whoever made the optimizer."""
        rate: float | None = self.norm_learning_rate
        optimizer: Any = self.optimizer
        # DeepSpeed and FSDP make another optimizer of the one that we made.
        is_ours = self._made in (optimizer, getattr(optimizer, "optimizer", None)) or self._sharded
        if rate is None or (self._made is not None and is_ours):
            return
        norms = {id(p) for p in _norms(self.model) if p.requires_grad} if self._shows_norms else set()
        groups = [group for group in optimizer.param_groups if any(id(p) in norms for p in group["params"])]
        if not groups or any(group.get("initial_lr", group["lr"]) != rate for group in groups):
            raise FastLNError(
                "norm_learning_rate has no effect on an optimizer that FastLNTrainer.create_optimizer did not make: "
                "call that in your own create_optimizer, leave the optimizer out of DeepSpeed's configuration, or "
                "leave norm_learning_rate out"
            )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that decay: matrices outside norms."""
        norms = set(norm_parameters(model))
        return [name for name, p in model.named_parameters() if p.dim() > 1 and name not in norms]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the Trainer's optimizer, with float32 copies of what trains in 16 bits.

        Norms get separate groups if they have a separate rate.

        Raises:
            FastLNError: if they have a separate rate and the optimizer has no norm in its parameter groups.
        """
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            optimizer = self._made = self.optimizer = self._with_copies(optimizer)
            if self.norm_learning_rate is not None:
                _set_rate(optimizer, _norms(model or self.model), self.norm_learning_rate)
        return optimizer

    def _with_copies(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return an optimizer with float32 copies of 16-bit parameters, or warn that this one has none."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        narrow = {parameter.dtype for parameter in parameters if parameter.dtype.itemsize == 2}
        if not narrow:
            return optimizer
        dtypes = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrow))
        if type(optimizer) is torch.optim.AdamW and self.optimizer_cls_and_kwargs is None and not self._sharded:
            logger.info("parameters train in %s: AdamW keeps float32 copies of them", dtypes)
            kept = ("params", "lr", "betas", "eps", "weight_decay")
            return MasterAdamW([{key: group[key] for key in kept} for group in optimizer.param_groups])
        logger.warning(
            "parameters train in %s, and %s keeps no float32 copies of them, so small steps are lost: load the model "
            "in float32",
            dtypes,
            type(optimizer).__name__,
        )
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

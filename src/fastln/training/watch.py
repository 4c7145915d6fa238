"""Checks that trained norms move and stay finite. Nothing else would show if they did not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastln.errors import FastLNError
from fastln.methods import norm_parameters
from fastln.processes import gathered

PATIENCE = 3
LEAST_RATE = 1e-5  # below it, a float32 γ of 1 may need many steps to change


class NormWatch(TrainerCallback):
    """Stops training when a trained norm does not move, and measures how far norms moved.

    A norm does not move if every element of a γ or β still has its initial value after `PATIENCE` optimizer steps at a
    rate of `LEAST_RATE` or more. That happens to a norm in bfloat16 whose steps all round to zero, to a norm that the
    optimizer does not have, and to a norm that the loss does not depend on.

    FSDP2 may shard the model after the watch has started; all processes then see the same.

    Args:
        model: The model that trains, before its first step.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = [name for name in norm_parameters(model) if model.get_parameter(name).requires_grad]
        places = [name.rpartition(".") for name in trained]
        self._norms = {
            name: (model.get_submodule(norm), own) for name, (norm, _, own) in zip(trained, places, strict=True)
        }
        self.start = {name: gathered(parameter).clone() for name, parameter in self.parameters.items()}
        self.n_steps = 0

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The current parameters of trained norms; sharding replaces them."""
        return {name: getattr(norm, own) for name, (norm, own) in self._norms.items()}

    @property
    def began_finite(self) -> dict[str, nn.Parameter]:
        """Those of `parameters` that were finite when the watch started."""
        return {name: p for name, p in self.parameters.items() if self.start[name].isfinite().all()}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the steps that are large enough to move every norm."""
        if any(group["lr"] >= LEAST_RATE for group in kwargs["optimizer"].param_groups):
            self.n_steps += 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check after the first few steps that every norm moved.

        Raises:
            FastLNError: naming the norms that did not.
        """
        if getattr(kwargs["optimizer"], "step_was_skipped", False):  # by loss scaling
            self.n_steps -= 1
        elif self.n_steps == PATIENCE:
            self.n_steps += 1  # once is enough
            still = {
                name: p.dtype
                for name, p in self.parameters.items()
                if torch.equal(*self._now_and_then(name, p))
                and not self._moved_in_float32(name, p, kwargs["optimizer"])
            }
            if still:
                dtypes = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in still.values()}))
                raise FastLNError(
                    f"{_some(list(still))} ({dtypes}) did not move in {PATIENCE} optimizer steps: the "
                    "values were cast to a dtype that rounds the steps away, the optimizer does not have them, or "
                    "their gradients are 0"
                )

    def _moved_in_float32(self, name: str, parameter: nn.Parameter, optimizer: Any) -> bool:
        """Whether the optimizer keeps a float32 copy that moved, by steps that the parameter's dtype rounds away."""
        copy = optimizer.state.get(parameter, {}).get("master")
        return copy is not None and not torch.equal(copy, self.start[name].to(copy.device, copy.dtype))

    def gamma_shift(self) -> float | None:
        """Return the mean |γ - initial γ| over all elements of trained norms; None if no γ trains."""
        pairs = (
            self._now_and_then(name, parameter)
            for name, parameter in self.parameters.items()
            if name.endswith(".weight")
        )
        shifts = [(now.float() - then.float()).abs().flatten() for now, then in pairs]
        return torch.cat(shifts).mean().item() if shifts else None

    def _now_and_then(self, name: str, parameter: Tensor) -> tuple[Tensor, Tensor]:
        now = gathered(parameter)
        if self.start[name].device != now.device:
            self.start[name] = self.start[name].to(now.device)
        return now, self.start[name]


def check_finite(parameters: Mapping[str, Tensor], step: int) -> None:
    """Check that parameters are finite; with several processes, all must call this, and all raise.

    Raises:
        FastLNError: naming the parameters that are not.
    """
    broken = [name for name, parameter in parameters.items() if not gathered(parameter).isfinite().all()]
    if broken:
        raise FastLNError(f"{_some(broken)} turned NaN or infinite by step {step}; try a lower learning rate")


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"

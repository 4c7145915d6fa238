"""AdaLoRA's part in training: it needs the number of steps, and a call after each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.tuners.adalora import AdaLoraModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

IMPORTANCE = "adalora.safetensors"
_AVERAGES = ("exp_avg_ipt", "exp_avg_unc")


class AdaLoRASteps(TrainerCallback):
    """Updates the ranks of peft's AdaLoRA after every step; does nothing for other models."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Set the number of steps over which AdaLoRA reduces its ranks."""
        if (tuner := _tuner(model)) is not None:
            tuner.rankallocator.set_total_step(state.max_steps)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Weigh the ranks by this step's gradients, and update them."""
        # The last step removes ranks by the weights from earlier steps; a single step has no such weights.
        if (tuner := _tuner(model)) is not None and state.max_steps > 1:
            tuner.update_and_allocate(state.global_step + 1)


def save_importance(model: nn.Module, folder: Path) -> None:
    """Write the running averages that AdaLoRA weighs ranks by; write nothing for other models."""
    if (tuner := _tuner(model)) is not None:
        averages = {
            f"{kind}/{name}": tensor
            for kind in _AVERAGES
            for name, tensor in getattr(tuner.rankallocator, kind).items()
        }
        save_file(averages, folder / IMPORTANCE)


def load_importance(model: nn.Module, folder: Path) -> None:
    """Read what `save_importance` wrote."""
    if (tuner := _tuner(model)) is None:
        return
    device = next(model.parameters()).device
    for key, tensor in load_file(folder / IMPORTANCE, device=str(device)).items():
        kind, _, name = key.partition("/")
        getattr(tuner.rankallocator, kind)[name] = tensor
        # The third kind is recomputed in every step, but peft takes its presence as a sign that the averages exist.
        tuner.rankallocator.ipt.setdefault(name, tensor)


def is_adalora(model: nn.Module) -> bool:
    """Whether peft's AdaLoRA is on the model."""
    return _tuner(model) is not None


def _tuner(model: nn.Module | None) -> AdaLoraModel | None:
    tuner = getattr(model, "base_model", None)
    return tuner if isinstance(tuner, AdaLoraModel) else None

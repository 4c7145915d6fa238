"""A progress bar for training that shows the loss, where transformers' own prints a line per step."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressBar(TrainerCallback):
    """One bar on stderr over all steps, with the running mean of the loss."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.mean: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Show the loss, averaged over about the last twenty steps."""
        if logs and "loss" in logs:
            loss = float(logs["loss"])
            self.mean = loss if self.mean is None else 0.95 * self.mean + 0.05 * loss
            self.bar.set_postfix(loss=f"{self.mean:.3f}", epoch=f"{state.epoch:.1f}", refresh=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.bar.close()

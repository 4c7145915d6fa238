"""The progress bar of a training run, and its log of every step's loss."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastln.errors import FastLNError
from fastln.ops.linear_cross_entropy import IGNORE_INDEX
from fastln.progress import bar


def check_loss(loss: float, step: int, sample_ids: Sequence[str] | None = None, reason: str | None = None) -> float:
    """Check that `loss` is a number, and return it.

    Raises:
        FastLNError: if it is NaN; the message names the samples if their ids are given, and the reason if it is known.
    """
    if math.isnan(loss):
        batch = f" in the batch of samples {', '.join(sample_ids)}" if sample_ids else ""
        why = f": {reason}" if reason else "; try a lower learning rate"
        raise FastLNError(f"the loss is not a number at step {step}{batch}{why}")
    return loss


def why_not_a_number(inputs: Mapping[str, Any]) -> str | None:
    """Return what in a batch makes a loss NaN; None if nothing in it does.

    Args:
        inputs: The model's arguments.
    """
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and not labels.is_floating_point() and (labels == IGNORE_INDEX).all():
        return (
            f"no position of this batch has a label (all are {IGNORE_INDEX}); look for samples without an answer, and "
            "for a maximum length that cuts answers off"
        )
    for name, value in inputs.items():
        if "mask" in name or not isinstance(value, Tensor):  # a mask may hold -inf
            continue
        if value.is_floating_point() and not value.isfinite().all():
            return f"{name} holds NaN or infinite values"
    return None


class ProgressBar(TrainerCallback):
    """A progress bar on stderr over all steps, with the running mean of the loss.

    Whoever trains calls `close` at the end, because the Trainer calls no callback when an error ends the training.
    """

    def __init__(self) -> None:
        self.bar: Any = None
        self.mean: float | None = None
        self._open = contextlib.ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self.bar = self._open.enter_context(
            bar(
                total=state.max_steps,
                initial=state.global_step,
                desc="train",
                unit="step",
                shown=state.is_world_process_zero,
            )
        )

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
        self.close()

    def close(self) -> None:
        """Close the bar if it is open."""
        self._open.close()


class StepLog(TrainerCallback):
    """Keeps every step's loss, and appends it to a file.

    Args:
        path: the file, one line of JSON per step; None for no file.
    """

    def __init__(self, path: Path | None) -> None:
        self.losses: list[float] = []
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from a resumed run's losses, and cut the file after the checkpoint's step; later steps run again."""
        self.losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if self.path is not None and self.path.is_file() and state.is_world_process_zero:
            with self.path.open(encoding="utf-8") as file:
                rows = list(itertools.islice(file, state.global_step))  # one row per step
            self.path.write_text("".join(rows), encoding="utf-8")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Keep the loss of the last step."""
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        self.losses.append(loss)
        if self.path is not None and state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                row = {"step": state.global_step, "epoch": state.epoch, "loss": loss, "lr": logs.get("learning_rate")}
                file.write(json.dumps(row) + "\n")

"""Fast LayerNorm tuning of transformers: compute and store only what training the norms needs."""

from typing import TYPE_CHECKING, Any

from fastln import ops
from fastln.adapters import load_adapter, save_adapter
from fastln.decision import Plan
from fastln.errors import FastLNError
from fastln.machine import warn_of_untested_versions
from fastln.merge import merge_adapter
from fastln.plan import apply, plan
from fastln.prepare import prepare, restore

if TYPE_CHECKING:
    from fastln.training.fastln_trainer import FastLNTrainer

__all__ = [
    "FastLNError",
    "FastLNTrainer",
    "Plan",
    "apply",
    "load_adapter",
    "merge_adapter",
    "ops",
    "plan",
    "prepare",
    "restore",
    "save_adapter",
]

warn_of_untested_versions()


def __getattr__(name: str) -> Any:
    # Imported on first use: the Trainer imports much of transformers, accelerate and peft.
    if name == "FastLNTrainer":
        from fastln.training.fastln_trainer import FastLNTrainer

        return FastLNTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

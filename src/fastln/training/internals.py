"""The private parts of transformers, accelerate and peft that the trainers rely on; checked at import.

If a release renamed one of them, nothing else would fail: the trainers' own methods would just not be called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from peft.tuners.adalora import AdaLoraModel, RankAllocator
from transformers import PreTrainedConfig, Trainer

from fastln.errors import FastLNError
from fastln.versions import TESTED_VERSIONS, package_version

SUPPORTED = {"transformers": TESTED_VERSIONS["transformers"], "accelerate": ">=1.15", "peft": ">=0.21"}
"""The versions that have them, as in pyproject.toml."""


@dataclass(frozen=True)
class Internal:
    """One method or attribute of another package's class.

    Attributes:
        package: the package.
        owner: the class.
        name: the name of the method or attribute.
        parameters: the method's first parameters, after `self`; none for an attribute.
    """

    package: str
    owner: type
    name: str
    parameters: tuple[str, ...] = ()


_OVERRIDDEN = {
    "_evaluate": ("trial", "ignore_keys_for_eval"),
    "_get_collator_with_removed_columns": ("data_collator", "description"),
    "_get_dataloader": ("dataset", "description", "batch_size", "sampler_fn", "is_training"),
    "_get_output_dir": ("trial",),
    "_load_best_model": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_save_checkpoint": ("model", "trial"),
    "save_model": ("output_dir", "_internal_call"),
}
INTERNALS = (
    *(Internal("transformers", Trainer, name, parameters) for name, parameters in _OVERRIDDEN.items()),
    Internal("transformers", PreTrainedConfig, "_attn_implementation"),
    Internal("accelerate", Accelerator, "is_fsdp2"),
    Internal("accelerate", AcceleratedOptimizer, "step_was_skipped"),
    Internal("peft", AdaLoraModel, "update_and_allocate", ("global_step",)),
    Internal("peft", RankAllocator, "set_total_step", ("total_step",)),
)


def check_internals(internals: Iterable[Internal] = INTERNALS) -> None:
    """Check that the installed packages have what the trainers rely on.

    Raises:
        FastLNError: for the first that is missing or has other first parameters; the message names the installed
            version and those that fastln works with.
    """
    for internal in internals:
        found = getattr(internal.owner, internal.name, None)
        if found is None:
            wrong = "is missing"
        elif callable(found) and (first := _first_parameters(found, len(internal.parameters))) != internal.parameters:
            wrong = f"takes ({', '.join(first)}), not ({', '.join(internal.parameters)}), as its first parameters"
        else:
            continue
        package = internal.package
        raise FastLNError(
            f"{package} {package_version(package)} does not fit fastln: {internal.owner.__name__}.{internal.name} "
            f"{wrong}; install {package}{SUPPORTED[package]}"
        )


def _first_parameters(method: Callable[..., object], count: int) -> tuple[str, ...]:
    return tuple(list(inspect.signature(method).parameters)[1 : 1 + count])

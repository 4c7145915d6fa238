"""Fast LayerNorm tuning of transformers: compute and store only what training the norms needs."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastln.versions import package_version, warn_of_untested_versions

if TYPE_CHECKING:
    from fastln import ops
    from fastln.adapters import load_adapter, save_adapter
    from fastln.decision import Plan
    from fastln.errors import FastLNError
    from fastln.merge import merge_adapter
    from fastln.plan import apply, plan
    from fastln.prepare import prepare, restore
    from fastln.training.fastln_trainer import FastLNTrainer
    from fastln.watch import watch_norms

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
    "watch_norms",
]
__version__ = package_version("fastln") or "unknown"

# Imported on first use: torch and transformers take seconds, and `fastln --help` needs neither.
_MODULE_OF = {
    "FastLNError": "errors",
    "FastLNTrainer": "training.fastln_trainer",
    "Plan": "decision",
    "apply": "plan",
    "load_adapter": "adapters",
    "merge_adapter": "merge",
    "plan": "plan",
    "prepare": "prepare",
    "restore": "prepare",
    "save_adapter": "adapters",
    "watch_norms": "watch",
}

warn_of_untested_versions()


class _Package(ModuleType):
    """This package: `fastln.plan` is the function, although there is a module of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Whatever imports a module sets it as an attribute of its package.
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("fastln.ops")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastln.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return what the package offers, without what it imports for itself."""
    own = {name for name in globals() if name.startswith("__")}
    return sorted(own | {*__all__})

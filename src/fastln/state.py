"""The record of what `prepare` did to a model, with which it is undone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from fastln.changes import Marks
from fastln.decision import Plan
from fastln.standins.int8 import Int8Weight
from fastln.standins.norm import Float32Parameters
from fastln.standins.part import Undo
from fastln.standins.values import remove_checks

STATE = "_fastln_state"


@dataclass
class Prepared:
    """A record of what `prepare` did to a model, so that `restore` can undo it.

    Attributes:
        plan: The plan that was carried out.
        requires_grad: The earlier `requires_grad` of every parameter, by name.
        dtypes: The earlier dtype of each parameter that became float32, by name.
        undo: Objects that undo the changes, in the order in which the changes were made.
        others: The dtypes of the other parameters.
        buffers: The marks of the model's buffers when it was first prepared.
    """

    plan: Plan
    requires_grad: dict[str, bool] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    undo: list[Undo] = field(default_factory=list)
    others: set[torch.dtype] = field(default_factory=set)
    buffers: Marks = field(default_factory=dict)

    def remove(self, model: nn.Module) -> None:
        """Undo every change to `model`. Tuned values stay, cast to the model's own dtype."""
        failures = []
        casts = self._casts(model)
        for change in self.undo:
            if isinstance(change, Float32Parameters):
                change.dtypes = {own: casts.get(dtype, dtype) for own, dtype in change.dtypes.items()}
        if prepared(model) is not None:
            delattr(model, STATE)
        steps: list[Callable[[], object]] = [change.remove for change in reversed(self.undo)]
        steps += [functools.partial(remove_checks, model), functools.partial(self._reset_flags, model)]
        for step in steps:
            try:
                step()
            except BaseException as error:  # the others are undone all the same
                failures.append(error)
        if failures:
            for other in failures[1:]:
                failures[0].add_note(f"Undoing another change failed too: {other!r}")
            raise failures[0]

    @property
    def n_lost(self) -> int:
        """The number of weights that were replaced by their 8-bit form and not kept."""
        return sum(isinstance(change, Int8Weight) and change.is_lost for change in self.undo)

    def _reset_flags(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad != (before := self.requires_grad.get(name, parameter.requires_grad)):
                parameter.requires_grad_(before)

    def _others(self, model: nn.Module) -> set[torch.dtype]:
        """The dtypes of the parameters that `prepare` did not cast."""
        return {p.dtype for name, p in model.named_parameters() if p.is_floating_point() and name not in self.dtypes}

    def _casts(self, model: nn.Module) -> dict[torch.dtype, torch.dtype]:
        """Return which dtype became which, if the whole model was cast since, as by `model.float()`."""
        now = self._others(model)
        gone = self.others - now
        return dict.fromkeys(gone, now.pop()) if len(now) == 1 else {}


def prepared(model: nn.Module) -> Prepared | None:
    """Return the record of what `prepare` did to `model`; None if the model is not prepared."""
    state: Prepared | None = model.__dict__.get(STATE)
    return state

"""Gives the stand-ins of a prepared model other storage modes."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from fastln.decision import Plan
from fastln.standins.attention import View, view_of
from fastln.standins.part import ATTRIBUTE, Part, is_stand_in
from fastln.standins.rotary import Turning
from fastln.standins.whole_block import WholeBlock


def set_storage(model: nn.Module, plan: Plan) -> list[WholeBlock]:
    """Give each stand-in the storage mode that a plan says.

    Args:
        model: The model, prepared by a plan with the same changes, but for storage modes.
        plan: The plan.

    Returns:
        What undoes the changes of whole blocks.
    """
    undo = []
    for change in plan.changes:
        module = model.get_submodule(change.name)
        if change.stand_in == "block":
            how, layers = change.detail
            undo.append(WholeBlock([model.get_submodule(name) for name in layers], how, model))
            undo[-1].put()
            continue
        if is_stand_in(module):
            part: Part = module.__dict__[ATTRIBUTE]
            settings = dataclasses.replace(part.settings, storage=change.storage)
            kind: Any = part.kind
            if isinstance(kind, Turning):
                kind = Turning(kind.stock, kind.name, settings)
            setattr(module, ATTRIBUTE, dataclasses.replace(part, settings=settings, kind=kind))
        view: Any = vars(module).get("config")
        if isinstance(view, View):
            settings = dataclasses.replace(view._fastln_settings, storage=change.storage)
            module.config = view_of(view._fastln_original, view._fastln_spec, settings)
    return undo

"""plan() decides what `prepare` will change in a model, and returns it as data. apply() carries it out."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastln.budget import AtFirstBatch, Planner, fit, outline_of, settle_budget
from fastln.changes import mark_buffers
from fastln.decider import Decider, describe_blocks, describe_unused
from fastln.decision import Change, Plan, Stay
from fastln.errors import FastLNError
from fastln.fits import check_fits, check_values, joined
from fastln.int8_rules import describe_int8
from fastln.machine import return_freed_memory, settle_device
from fastln.methods import (
    FROZEN,
    describe_other_norms,
    get_method,
    random_heads,
    select_parameters,
    settle_scope,
)
from fastln.ops import OpSettings
from fastln.ops.backends import resolve
from fastln.ops.settings import STORAGES
from fastln.standins.int8 import Int8Weight
from fastln.standins.part import is_stand_in
from fastln.standins.table import STAND_INS, Place
from fastln.standins.tricks import TRICKS
from fastln.standins.values import add_checks
from fastln.state import STATE, Prepared, prepared
from fastln.step_time import nominal

logger = logging.getLogger(__name__)


def plan(
    model: nn.Module,
    method: str = "layernorm",
    *,
    scope: str | Iterable[str] | None = None,
    also: str | Iterable[str] = (),
    activations: str = "exact",
    memory_budget: float | str | None = None,
    products: str = "exact",
    without: str | Iterable[str] = (),
    keep_weights: bool = False,
    backend: str = "auto",
    device: torch.device | str | None = None,
    batch: Mapping[str, Any] | None = None,
) -> Plan:
    """Decide what `prepare` would change in a model, without changing it.

    Args:
        model: Any transformers model. It may be on the meta device.
        method: As for `fastln.prepare`.
        scope: As for `fastln.prepare`.
        also: As for `fastln.prepare`.
        activations: As for `fastln.prepare`.
        memory_budget: As for `fastln.prepare`.
        products: As for `fastln.prepare`.
        without: As for `fastln.prepare`.
        keep_weights: As for `fastln.prepare`.
        backend: As for `fastln.prepare`.
        device: The device that the model will run on. By default the model's current device; for a model on the meta
            device, the GPU if there is one.
        batch: As for `fastln.prepare`.

    Returns:
        The plan. Print its `table()`, or carry it out with `apply`.

    Raises:
        FastLNError: As for `fastln.prepare`.
    """
    _check_stock(model)
    settings = OpSettings(backend, activations, products)
    asked = _Asked(method, scope, also, settings, settle_without(without), keep_weights, device)
    if memory_budget is None:
        return asked.plan(model)
    if activations != "exact":
        raise FastLNError(f"memory_budget chooses storage modes itself: leave out activations={activations!r}")
    n_bytes = settle_budget(memory_budget, _settle_place(model, device))
    if batch is None:
        return asked.plan(model, n_bytes=n_bytes)
    # What a plan says of heads without a checkpoint, an outline on the meta device cannot.
    asked = _Asked.by(asked.plan(model))
    found = fit(outline_of(model).train(), batch, n_bytes, asked.planner)
    return asked.plan(model, dict(found.storages), note=found.describe(n_bytes))


@dataclass(frozen=True)
class _Asked:
    """The arguments of `plan` after the model."""

    method: str
    scope: str | Iterable[str] | None
    also: str | Iterable[str]
    settings: OpSettings
    without: tuple[str, ...]
    keep_weights: bool
    device: torch.device | str | None

    @classmethod
    def by(cls, plan: Plan) -> _Asked:
        """Return what made a plan."""
        return cls(plan.method, plan.scope, plan.also, plan.settings, plan.without, plan.keep_weights, plan.device)

    @property
    def planner(self) -> Planner:
        """How to choose storage modes for it."""
        # Codes of 4 and 2 bits change gradients so much that they must be asked for.
        modes = [mode for mode, kept in STORAGES.items() if mode != "exact" and kept.code_bits in (None, 8)]
        modes.remove("offload")  # the meta device has no host to move to
        if "rounding" in self.without:
            modes = [mode for mode in modes if STORAGES[mode].x_hat_bits is None]
        assert self.device is not None  # it is a plan's
        return Planner(self.plan, apply, _undone, modes, nominal(torch.device(self.device)))

    def plan(
        self,
        model: nn.Module,
        storages: Mapping[str, str] = MappingProxyType({}),
        *,
        n_bytes: int | None = None,
        note: str | None = None,
    ) -> Plan:
        """Decide, with these storage modes of blocks; with a budget, leave them open until the first batch."""
        return _decide(model, self, storages, n_bytes, note)


def _undone(model: nn.Module) -> None:
    state = prepared(model)
    assert state is not None
    state.remove(model)


def _decide(
    model: nn.Module, asked: _Asked, storages: Mapping[str, str], n_bytes: int | None, note: str | None
) -> Plan:
    settings, left_out, keep_weights = asked.settings, asked.without, asked.keep_weights
    method, scope = settle_scope(asked.method, asked.scope)
    also = (asked.also,) if isinstance(asked.also, str) else tuple(asked.also)
    chosen, _ = get_method(method)
    random = random_heads(model, select_parameters(model, chosen, scope, also), left_out, scope)
    also = (*also, *random.train)
    trained = frozenset(select_parameters(model, chosen, scope, also))
    if not trained and method != FROZEN:
        raise FastLNError(f"method {method!r} trains nothing by itself; list the task head's modules in `also`")
    place = _settle_place(model, asked.device)
    resolve("layer_norm", place, settings)  # raises if the backend is not available
    is_open = n_bytes is not None
    decided = Decider(model, trained, left_out, settings, place, keep_weights, storages, is_open).decide(random)
    notes = (
        describe_other_norms(model, trained, scope),
        random.note,
        describe_unused(left_out, decided),
        describe_int8(decided, settings, keep_weights, model, place),
        describe_blocks(decided, settings),
        f"memory budget {n_bytes:,} bytes: the first batch decides what each block keeps" if n_bytes else note,
    )
    parameters = dict(model.named_parameters())
    return Plan(
        model=type(model).__name__,
        method=method,
        scope=(scope,) if isinstance(scope, str) else None if scope is None else tuple(scope),
        also=also,
        device=str(place),
        settings=settings,
        without=left_out,
        trained=trained,
        n_trained=sum(parameters[name].numel() for name in trained),
        n_total=sum(parameter.numel() for parameter in parameters.values()),
        changes=tuple(entry for entry in decided if isinstance(entry, Change)),
        stays=tuple(entry for entry in decided if isinstance(entry, Stay)),
        notes=tuple(note for note in notes if note is not None),
        storages=tuple(storages.items()),
        keep_weights=keep_weights,
        n_bytes=n_bytes,
    )


def apply(plan: Plan, model: nn.Module) -> None:
    """Carry out a plan, in place. If anything fails, the model stays unchanged.

    Args:
        plan: A plan for this model, or for a model of the same configuration on the meta device.
        model: The model.

    Raises:
        FastLNError: If the plan is for another model, or the model is already prepared. Nothing changes then.
        BaseException: Any exception from a step, including KeyboardInterrupt. All changes are undone first.
    """
    _check_stock(model)
    check_fits(plan, model)
    check_values(plan, model)
    with torch.inference_mode(False):  # tensors that are made under it never train
        _carry_out(plan, model)


def _carry_out(plan: Plan, model: nn.Module) -> None:
    state = Prepared(plan, buffers=mark_buffers(model))
    before: dict[str, Tensor] = {}
    try:
        if plan.n_bytes is not None:
            state.undo.append(waiting := AtFirstBatch(model, plan.n_bytes, _Asked.by(plan).planner))
            waiting.put()
        setattr(model, STATE, state)
        for name, parameter in model.named_parameters():
            state.requires_grad[name] = parameter.requires_grad
            parameter.requires_grad_(name in plan.trained)
        for change in plan.changes:
            dtypes = dict(change.dtypes)
            for own, dtype in dtypes.items():
                name = joined(change.name, own)
                before[name] = model.get_parameter(name).data
                state.dtypes[name] = dtype
            # The operations of a change whose products the plan calls exact must not decide again.
            products = "exact" if change.products == "exact" else plan.settings.products
            settings = dataclasses.replace(plan.settings, storage=change.storage, products=products)
            place = Place(model, change.name, change.detail, settings, dtypes, state.undo)
            STAND_INS[change.stand_in].put(place)
        add_checks(model)
        state.others = state._others(model)
        if plan.n_bytes is not None:
            state.undo.append(state.undo.pop(0))  # what it puts into blocks comes last, and goes first
        rounded = [undo for undo in state.undo if isinstance(undo, Int8Weight)]
        for undo in rounded:
            undo.settle()
        if rounded:
            return_freed_memory()
    except BaseException:
        # First the original tensors: casting back would need memory, and perhaps there is none.
        for name, tensor in before.items():
            model.get_parameter(name).data = tensor
        state.remove(model)
        raise


def settle_without(without: str | Iterable[str]) -> tuple[str, ...]:
    """Return the names of what is left out, each once.

    Raises:
        FastLNError: If one is not a key of `TRICKS`.
    """
    names = (without,) if isinstance(without, str) else tuple(without)
    for name in names:
        if name not in TRICKS:
            near = difflib.get_close_matches(str(name), TRICKS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise FastLNError(f"unknown name {name!r} in `without`{hint} (valid: {', '.join(TRICKS)})")
    return tuple(dict.fromkeys(names))


def _settle_place(model: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    here = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return settle_device("auto") if here.type == "meta" else here


def _check_stock(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise FastLNError(f"the model must be a torch.nn.Module, such as a transformers model; it is {model!r}")
    if (state := prepared(model)) is not None:
        if state.n_lost:  # `restore` would refuse
            raise FastLNError(
                "this model is already prepared, with products='int8', and the weights which that replaced are gone: "
                "load the model anew to prepare it otherwise (keep_weights=True lets you restore it)"
            )
        raise FastLNError("this model is already prepared; call fastln.restore(model) first")
    inside = next(
        (name for name, module in model.named_modules() if prepared(module) is not None or is_stand_in(module)), None
    )
    if inside is not None:
        raise FastLNError(
            f"{inside!r} in this model, or a model around it, is already prepared; restore that first, then prepare "
            "the outermost model and use `scope` to choose the sub-models to tune"
        )

"""plan() decides what `prepare` will change in a model, and returns it as data. apply() carries it out."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastln.changes import mark_buffers
from fastln.decision import Change, Plan, Stay
from fastln.errors import FastLNError
from fastln.families.parts import pretrained_models
from fastln.families.recognise import Found, recognise
from fastln.fits import check_fits, check_values, class_name, joined
from fastln.int8_rules import INT8_STAND_INS, Int8Rules, describe_int8
from fastln.machine import return_freed_memory, settle_device, why_no_arena
from fastln.methods import (
    FROZEN,
    RANDOM_HEADS,
    RandomHeads,
    describe_other_norms,
    get_method,
    random_heads,
    select_parameters,
    settle_scope,
)
from fastln.ops import OpSettings
from fastln.ops.backends import resolve
from fastln.standins.attention import NAME, ViewSpec, flash_views
from fastln.standins.int8 import Int8Spec, Int8Weight
from fastln.standins.part import is_stand_in
from fastln.standins.table import STAND_INS, Place
from fastln.standins.tricks import TRICKS
from fastln.standins.values import add_checks
from fastln.state import STATE, Prepared, prepared
from fastln_kernels.cpu import units

logger = logging.getLogger(__name__)


def plan(
    model: nn.Module,
    method: str = "layernorm",
    *,
    scope: str | Iterable[str] | None = None,
    also: str | Iterable[str] = (),
    activations: str = "exact",
    products: str = "exact",
    without: str | Iterable[str] = (),
    keep_weights: bool = False,
    backend: str = "auto",
    device: torch.device | str | None = None,
) -> Plan:
    """Decide what `prepare` would change in a model, without changing it.

    Args:
        model: Any transformers model. It may be on the meta device.
        method: As for `fastln.prepare`.
        scope: As for `fastln.prepare`.
        also: As for `fastln.prepare`.
        activations: As for `fastln.prepare`.
        products: As for `fastln.prepare`.
        without: As for `fastln.prepare`.
        keep_weights: As for `fastln.prepare`.
        backend: As for `fastln.prepare`.
        device: The device that the model will run on. By default the model's current device; for a model on the meta
            device, the GPU if there is one.

    Returns:
        The plan. Print its `table()`, or carry it out with `apply`.

    Raises:
        FastLNError: As for `fastln.prepare`.
    """
    _check_stock(model)
    settings = OpSettings(backend, activations, products)
    left_out = settle_without(without)
    method, scope = settle_scope(method, scope)
    also = (also,) if isinstance(also, str) else tuple(also)
    chosen, _ = get_method(method)
    random = random_heads(model, select_parameters(model, chosen, scope, also), left_out, scope)
    also = (*also, *random.train)
    trained = frozenset(select_parameters(model, chosen, scope, also))
    if not trained and method != FROZEN:
        raise FastLNError(f"method {method!r} trains nothing by itself; list the task head's modules in `also`")
    place = _settle_place(model, device)
    resolve("layer_norm", place, settings)  # raises if the backend is not available
    decided = _Decider(model, trained, left_out, settings, place, keep_weights).decide(random)
    notes = (
        describe_other_norms(model, trained, scope),
        random.note,
        _describe_unused(left_out, decided),
        describe_int8(decided, settings, keep_weights, model, place),
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
            exact = change.products == "exact"
            settings = dataclasses.replace(plan.settings, products="exact") if exact else plan.settings
            place = Place(model, change.name, change.detail, settings, dtypes, state.undo)
            STAND_INS[change.stand_in].put(place)
        add_checks(model)
        state.others = state._others(model)
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


# What `backend="reference"` leaves out; norms, activations, dropout and their blocks run as their definitions.
_NOT_PLAIN = ("last_block", "arena", "blip_attention", "blip_text_attention")


class _Decider:
    """Decides for each module that fastln recognises: a change, or why it stays stock."""

    def __init__(
        self,
        model: nn.Module,
        trained: frozenset[str],
        without: tuple[str, ...],
        settings: OpSettings,
        device: torch.device,
        keep_weights: bool,
    ) -> None:
        self._model = model
        self._without = without
        self._settings = settings
        self._device = device
        self._int8 = Int8Rules(model, settings, device, keep_weights) if settings.products == "int8" else None
        self._modules = dict(model.named_modules())
        self._trained = {id(p): p for name, p in model.named_parameters() if name in trained}

    def decide(self, random: RandomHeads) -> list[Change | Stay]:
        found = recognise(self._model)
        heads = {entry.name for entry in found if entry.what == "lm_head" and self._waits()}
        decided: list[Change | Stay] = self._flash_attention(found)
        flash = {entry.name for entry in decided if isinstance(entry, Change)}
        for entry in found:
            if (entry.what in ("linear", "conv1d") and entry.name in heads) or (
                entry.what == "attention" and entry.name in flash
            ):
                continue
            decided.append(self._of(entry))
        decided += self._model_dtypes(decided)
        by_scope = None if RANDOM_HEADS in self._without else "the scope leaves it out"
        decided += [self._known(Found(name, "random_head", "random head")) for name in random.train]
        decided += [self._known(Found(name, "random_head", "random head", obstacle=by_scope)) for name in random.frozen]
        if self._device.type == "cpu":
            arena = Found("", "arena", "memory of large tensors", obstacle=why_no_arena(self._device))
            decided.append(self._of(arena))
        return decided

    def _of(self, entry: Found) -> Change | Stay:
        match entry.what:
            case "layer_norm" | "norm" | "slow_norm":
                return self._norm(entry)
            case "attention":
                return self._attention(entry)
            case "rotary":
                return self._on_cpus("rotary", entry)
            case "linear" | "conv1d":
                return self._linear(entry)
            case "patches":
                return self._patches(entry)
            case "lm_head":
                return self._head(entry)
        if entry.what in _NOT_PLAIN and self._settings.backend == "reference":
            return Stay(entry.name, entry.label, entry.obstacle or "backend 'reference' is plain PyTorch")
        return self._known(entry)

    def _known(self, entry: Found, detail: Any = None) -> Change | Stay:
        """Change the module, unless it has an obstacle or `without` leaves it out."""
        row = STAND_INS[entry.what]
        if entry.obstacle is not None:
            return Stay(entry.name, entry.label, entry.obstacle)
        if row.trick in self._without:
            return Stay(entry.name, entry.label, _left_out(row.trick))
        return self._change(entry, entry.what, entry.detail if detail is None else detail)

    def _change(
        self, entry: Found, stand_in: str, detail: Any, dtypes: tuple[tuple[str, torch.dtype], ...] = ()
    ) -> Change:
        row = STAND_INS[stand_in]
        products, why_exact = self._products(stand_in, entry, detail)
        return Change(
            name=entry.name,
            kind=entry.label,
            stand_in=stand_in,
            becomes=_becomes(row.becomes, detail, dtypes),
            trick=row.trick,
            keeps=row.keeps(self._settings.keeps) if callable(row.keeps) else row.keeps,
            products=products,
            reason=row.reason,
            stock=class_name(self._modules[entry.name]),
            detail=detail,
            dtypes=dtypes,
            why_exact=why_exact,
        )

    def _norm(self, entry: Found) -> Change | Stay:
        norm = self._modules[entry.name]
        dtypes = tuple(
            (own, parameter.dtype)
            for own, parameter in norm.named_parameters(recurse=False)
            if id(parameter) in self._trained
        )
        left_out = "norms" in self._without
        if entry.obstacle is None and not left_out:
            return self._change(entry, entry.what, entry.detail, dtypes)
        reason = entry.obstacle or _left_out("norms")
        if not dtypes:
            return Stay(entry.name, entry.label, reason)
        return dataclasses.replace(self._change(entry, "slow_norm", None, dtypes), reason=reason)

    def _model_dtypes(self, decided: list[Change | Stay]) -> list[Change | Stay]:
        """Keep the `dtype` of models: it is that of the first float, which may become float32, or be in 8 bits."""
        changes = [entry for entry in decided if isinstance(entry, Change)]
        changed = {
            id(self._modules[entry.name].get_parameter(own))
            for entry in changes
            for own, dtype in entry.dtypes
            if dtype.itemsize == 2
        }
        rounded = {id(self._modules[c.name].weight) for c in changes if c.stand_in in INT8_STAND_INS.values()}
        found: list[Change | Stay] = []
        for name, part in pretrained_models(self._model):
            floats = [parameter for parameter in part.parameters() if parameter.is_floating_point()]
            first = next((id(parameter) for parameter in floats if id(parameter) not in rounded), None)
            if first in changed:
                entry = Found(name, "model_dtype", "dtype of a model")
                found.append(self._change(entry, "model_dtype", floats[0].dtype))
        return found

    def _waits(self) -> bool:
        return "late_logits" not in self._without and self._settings.backend != "reference"

    def _attention(self, entry: Found) -> Change | Stay:
        if self._settings.keeps.again:  # torch's own attention, where fastln has no kernels, must not keep its inputs
            return self._known(entry, ViewSpec(NAME))
        return self._on_cpus("attention", entry, ViewSpec(NAME))

    def _on_cpus(self, op: str, entry: Found, detail: Any = None) -> Change | Stay:
        """Change a module whose operation has kernels for CPUs alone."""
        choice = resolve(op, self._device, self._settings)
        if choice.backend != "cpu":
            return Stay(entry.name, entry.label, entry.obstacle or choice.reason)
        return self._known(entry, detail)

    def _flash_attention(self, found: list[Found]) -> list[Change | Stay]:
        if self._device.type != "cuda" or self._settings.backend == "reference" or self._settings.keeps.again:
            return []
        kept = [entry.name for entry in found if entry.what == "attention" and entry.obstacle is not None]
        views = flash_views(self._model, kept)
        return [self._known(Found(name, "attention", "attention"), spec) for name, spec in views.items()]

    def _products(self, stand_in: str, entry: Found, detail: Any) -> tuple[str | None, str | None]:
        """In which form a change's products run; and why they are exact although 8 bits were asked for."""
        if not STAND_INS[stand_in].has_products:
            return None, None
        return ("exact", None) if self._int8 is None else self._int8.products(stand_in, entry.name, detail)

    def _linear(self, entry: Found) -> Change | Stay:
        exact = self._exact_linear(entry)
        if self._int8 is None or entry.obstacle is not None or "linears" in self._without:
            return exact
        if id(self._modules[entry.name].weight) in self._trained:
            return exact
        spec = self._int8.of(entry.name)
        if isinstance(spec, Int8Spec):
            return self._change(entry, INT8_STAND_INS[entry.what], spec)
        if isinstance(exact, Stay):
            other = exact.reason.removesuffix(f"; {spec}")  # the same cause keeps it from the exact kernels
            return dataclasses.replace(exact, reason=f"not in 8 bits: {spec}; {other}")
        return dataclasses.replace(exact, why_exact=spec)

    def _head(self, entry: Found) -> Change | Stay:
        if self._settings.backend == "reference":
            return Stay(entry.name, entry.label, entry.obstacle or "backend 'reference' is plain PyTorch")
        own = self._modules[entry.name].parameters(recurse=False)
        spec = None
        if self._int8 is not None and entry.obstacle is None and not any(id(p) in self._trained for p in own):
            spec = self._int8.of(entry.name, is_head=True)
        return self._known(entry, spec if isinstance(spec, Int8Spec) else None)

    def _patches(self, entry: Found) -> Change | Stay:
        exact = self._exact_linear(entry)
        if not isinstance(exact, Change):
            return exact
        has_such_rows = self._modules[entry.name].weight.dtype == torch.bfloat16
        if units.compute_dtype(torch.bfloat16, quietly=not has_such_rows) == torch.bfloat16:
            return Stay(entry.name, entry.label, "torch's convolutions use the fastest units here")
        return exact

    def _exact_linear(self, entry: Found) -> Change | Stay:
        choice = resolve("linear", self._device, self._settings)
        if choice.backend != "cpu" and not (self._settings.keeps.again and entry.what != "patches"):
            return Stay(entry.name, entry.label, choice.reason)
        if id(self._modules[entry.name].weight) in self._trained:
            return Stay(entry.name, entry.label, "the weight trains")
        return self._known(entry)


def _becomes(what: str, detail: Any, dtypes: tuple[tuple[str, torch.dtype], ...]) -> str:
    if isinstance(detail, ViewSpec) and detail.name != NAME:
        what = "flash-attn"
    if not dtypes:
        return what
    return f"{what}, {'float64' if any(dtype == torch.float64 for _, dtype in dtypes) else 'float32'}"


def _left_out(trick: str) -> str:
    return f"left out: without={trick!r}"


def _describe_unused(without: tuple[str, ...], decided: Iterable[Change | Stay]) -> str | None:
    """Describe which names in `without` left nothing out; None if all did, or were there for heads that may come.

    Who leaves out everything means no change in particular.
    """
    if set(without) == set(TRICKS):
        return None
    reasons = {entry.reason for entry in decided}
    unused = [name for name in without if name != RANDOM_HEADS and _left_out(name) not in reasons]
    return f"without {', '.join(map(repr, unused))} has no effect on this model here" if unused else None


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

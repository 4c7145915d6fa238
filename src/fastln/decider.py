"""Decides for each module that fastln recognises: a change, or why it stays stock."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fastln.decision import Change, Stay
from fastln.families.parts import block_name, blocks_of, pretrained_models
from fastln.families.recognise import Found, recognise
from fastln.fits import class_name
from fastln.int8_rules import INT8_STAND_INS, Int8Rules
from fastln.machine import why_no_arena
from fastln.methods import RANDOM_HEADS, RandomHeads
from fastln.ops import OpSettings
from fastln.ops.backends import resolve
from fastln.ops.settings import STORAGES
from fastln.standins.attention import NAME, ViewSpec, flash_views
from fastln.standins.int8 import Int8Spec
from fastln.standins.table import STAND_INS
from fastln.standins.tricks import TRICKS
from fastln_kernels.cpu import units

# What `backend="reference"` leaves out; norms, activations, dropout and their blocks run as their definitions.
_NOT_PLAIN = ("last_block", "arena", "blip_attention", "blip_text_attention")


class Decider:
    """Decides for each module that fastln recognises: a change, or why it stays stock."""

    def __init__(
        self,
        model: nn.Module,
        trained: frozenset[str],
        without: tuple[str, ...],
        settings: OpSettings,
        device: torch.device,
        keep_weights: bool,
        storages: Mapping[str, str],
        is_open: bool,
    ) -> None:
        self._model = model
        self._without = without
        self._settings = settings
        self._device = device
        self._storages, self._is_open = dict(storages), is_open
        self._int8 = Int8Rules(model, settings, device, keep_weights) if settings.products == "int8" else None
        self._modules = dict(model.named_modules())
        self._trained = {id(p): p for name, p in model.named_parameters() if name in trained}

    def _storage(self, name: str) -> str:
        """The name of the storage mode of a module."""
        return self._storages.get(block_name(name), self._settings.storage)

    def _makes_again(self, name: str) -> bool:
        return self._is_open or STORAGES[self._storage(name)].again

    def _blocks(self) -> list[Change | Stay]:
        """What happens to whole blocks."""
        decided: list[Change | Stay] = []
        for block, layers in blocks_of(self._model).items():
            how = STORAGES[self._storage(block)].block
            if how is None:
                continue
            obstacle = None if layers else "transformers has no way to compute this block again; its storage is exact"
            if how == "offload" and self._device.type != "cuda":
                obstacle = "its activations are in the host's memory already; its storage is exact"
            decided.append(self._known(Found(block, "block", "block", (how, layers), obstacle)))
        return decided

    def decide(self, random: RandomHeads) -> list[Change | Stay]:
        """Return what is decided for each module, and for the random heads."""
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
        decided += self._blocks()
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
        row, storage = STAND_INS[stand_in], self._storage(entry.name)
        products, why_exact = self._products(stand_in, entry, detail)
        return Change(
            name=entry.name,
            kind=entry.label,
            stand_in=stand_in,
            becomes=_becomes(row.becomes, detail, dtypes),
            trick=row.trick,
            keeps=row.keeps(STORAGES[storage]) if callable(row.keeps) else row.keeps,
            storage=storage,
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
        if self._makes_again(
            entry.name
        ):  # torch's own attention, where fastln has no kernels, must not keep its inputs
            return self._known(entry, ViewSpec(NAME))
        return self._on_cpus("attention", entry, ViewSpec(NAME))

    def _on_cpus(self, op: str, entry: Found, detail: Any = None) -> Change | Stay:
        """Change a module whose operation has kernels for CPUs alone."""
        choice = resolve(op, self._device, self._settings)
        if choice.backend != "cpu":
            return Stay(entry.name, entry.label, entry.obstacle or choice.reason)
        return self._known(entry, detail)

    def _flash_attention(self, found: list[Found]) -> list[Change | Stay]:
        if self._device.type != "cuda" or self._settings.backend == "reference":
            return []
        if self._is_open or any(STORAGES[mode].again for mode in (self._settings.storage, *self._storages.values())):
            return []  # flash-attn keeps its inputs
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
        if choice.backend != "cpu" and (entry.what == "patches" or not self._makes_again(entry.name)):
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


def describe_unused(without: tuple[str, ...], decided: Iterable[Change | Stay]) -> str | None:
    """Describe which names in `without` left nothing out; None if all did, or were there for heads that may come.

    Who leaves out everything means no change in particular.
    """
    if set(without) == set(TRICKS):
        return None
    reasons = {entry.reason for entry in decided}
    unused = [name for name in without if name not in (RANDOM_HEADS, "rounding") and _left_out(name) not in reasons]
    return f"without {', '.join(map(repr, unused))} has no effect on this model here" if unused else None


def describe_blocks(decided: Iterable[Change | Stay], settings: OpSettings) -> str | None:
    """Say that a storage mode of whole blocks has no effect on a model without any; None if it has one."""
    if settings.keeps.block is None or any(entry.kind == "block" for entry in decided):
        return None
    return (
        f"activations {settings.storage!r} has no effect: no block of this model is known (an entry of a list of "
        "modules, with attention in it), so all of it keeps what 'exact' does"
    )

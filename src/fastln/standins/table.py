"""The table of stand-ins: for each kind of change, what replaces the module and how."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastln.families.activations import is_shared
from fastln.families.norms import returned_dtype
from fastln.families.readers import readers_of
from fastln.ops import OpSettings
from fastln.ops.settings import Storage
from fastln.standins.activation import Activation
from fastln.standins.arena import Arena
from fastln.standins.attention import AttentionSwitch
from fastln.standins.blip_attention import BlipAttention, BlipTextSelfAttention
from fastln.standins.dropout import CallsDropout, Dropout
from fastln.standins.gated_mlp import GatedMLP
from fastln.standins.int8 import Int8Conv1D, Int8Linear, Int8Weight
from fastln.standins.last_block import WaitingRows
from fastln.standins.linear import Conv1D, Linear, Patches
from fastln.standins.lm_head import LMHead
from fastln.standins.model_dtype import OwnDtype
from fastln.standins.norm import Float32Parameters, LayerNorm, Norm, StockNorm, in_own_dtype
from fastln.standins.part import ClassChange, StandIn, Undo, stand_in
from fastln.standins.post_norm import DenseDropoutAddNorm
from fastln.standins.rotary import Rotary, Turning
from fastln.standins.training_steps import NoCache, NoReentry
from fastln.standins.whole_block import WholeBlock


@dataclass(frozen=True)
class Place:
    """The place of a change.

    Attributes:
        model: The model to prepare.
        name: The module's name in it; empty for the model itself.
        detail: What is known about the module, such as which norm it computes.
        settings: How operations run.
        dtypes: The current dtypes of the module's own parameters that become float32, by name.
        undo: A list that receives the object that undoes the change, before the change is made.
    """

    model: nn.Module
    name: str
    detail: Any
    settings: OpSettings
    dtypes: Mapping[str, torch.dtype]
    undo: list[Undo] = field(default_factory=list)

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.model.get_submodule(self.name)


@dataclass(frozen=True)
class Row:
    """A kind of change.

    Attributes:
        trick: Its name in `fastln.standins.tricks.TRICKS`; None if it cannot be left out.
        becomes: What replaces the part, in words for the user.
        keeps: What it keeps for backward; a function if that depends on the storage.
        has_products: Whether it multiplies matrices.
        reason: Why the part changes.
        put: The function that makes the change.
    """

    trick: str | None
    becomes: str
    keeps: str | Callable[[Storage], str]
    has_products: bool
    reason: str
    put: Callable[[Place], None]


def _swap(form: type[StandIn]) -> Callable[[Place], None]:
    def put(place: Place) -> None:
        place.undo.append(ClassChange(place.module))
        stand_in(place.module, form, place.settings, place.detail)

    return put


def _norm(form: type[StandIn]) -> Callable[[Place], None]:
    def put(place: Place) -> None:
        module = place.module
        more: dict[str, Any] = {}
        narrow = next((dtype for dtype in place.dtypes.values() if dtype.itemsize == 2), None)
        own = next((p.dtype for p in module.parameters(recurse=False) if p.dtype.itemsize == 2), None)
        if narrow is not None:
            more = {"dtype": narrow, "readers": readers_of(place.model, place.name, place.dtypes)}
        if own is not None:
            more["of_float32"] = returned_dtype(module, own, torch.float32) or own
        elif form is Norm and returned_dtype(module, torch.float32, torch.bfloat16) == torch.float32:
            more = {"widens": True}
        if place.dtypes:
            cast = Float32Parameters(module, dict(place.dtypes))
            place.undo.append(cast)
            cast.put()
        if form is StockNorm and narrow is None:
            return
        place.undo.append(ClassChange(module))
        stand_in(module, form, place.settings, place.detail, **more)
        if form is StockNorm:
            place.undo.append(module.register_forward_hook(in_own_dtype, with_kwargs=True))

    return put


def _int8(form: type[StandIn]) -> Callable[[Place], None]:
    def put(place: Place) -> None:
        made = Int8Weight(place.module, place.module.get_parameter("weight"))
        place.undo.append(made)
        made.put(place.detail, form, place.settings)

    return put


def _own_dtype(place: Place) -> None:
    place.undo.append(ClassChange(place.module))
    stand_in(place.module, OwnDtype, place.settings, dtype=place.detail)


def _activation(place: Place) -> None:
    module = place.module
    if is_shared(module, place.model):
        own = copy.copy(module)
        replaced = Replaced(place.model, module, own)
        place.undo.append(replaced)
        replaced.put()
        module = own
    place.undo.append(ClassChange(module))
    stand_in(module, Activation, place.settings, place.detail)


@dataclass
class Replaced:
    """Replaces a module that other models share by the model's own copy.

    Attributes:
        model: The model.
        module: The shared module.
        own: The model's own copy.
    """

    model: nn.Module
    module: nn.Module
    own: nn.Module

    def put(self) -> None:
        """Put in the model's own copy wherever the model holds the shared module."""
        _replace(self.model, self.module, self.own)

    def remove(self) -> None:
        """Put the shared module back."""
        _replace(self.model, self.own, self.module)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


def _attention(place: Place) -> None:
    switch = AttentionSwitch(place.module, place.module.config)
    place.undo.append(switch)
    switch.put(place.detail, place.settings)


def _rotary(place: Place) -> None:
    place.undo.append(ClassChange(place.module))
    stand_in(place.module, Rotary, place.settings, Turning(type(place.module), place.detail, place.settings))


def _last_block(place: Place) -> None:
    parts = place.detail.split(".")
    around = tuple(place.model.get_submodule(".".join(parts[:n])) for n in range(len(parts)))
    rows = WaitingRows(place.model.get_submodule(place.detail), around, place.module)
    place.undo.append(rows)
    rows.put()


def _no_cache(place: Place) -> None:
    made = NoCache(place.module, place.detail)
    place.undo.append(made)
    made.put()


def _no_reentry(place: Place) -> None:
    made = NoReentry(place.module)
    place.undo.append(made)
    made.put()


def _block(place: Place) -> None:
    how, layers = place.detail
    made = WholeBlock([place.model.get_submodule(name) for name in layers], how, place.model)
    place.undo.append(made)
    made.put()


def _nothing(place: Place) -> None:
    """Change nothing: that it trains is all."""


def _arena(place: Place) -> None:
    arena = Arena()
    place.undo.append(arena)
    arena.put()


def _norm_keeps(storage: Storage) -> str:
    return (
        "x_hat in 8 bits, a float32 per 64 columns and one per row"
        if storage.x_hat_bits
        else "its input, a float32 per row"
    )


def _post_norm_keeps(storage: Storage) -> str:
    return _norm_keeps(storage) if storage.x_hat_bits else "x_hat, a float32 per row"


def _attention_keeps(storage: Storage) -> str:
    rest = "the result, a float32 per query and head"
    return f"{rest}; q, k, v are made again" if storage.again else f"q, k, v, {rest}"


def _activation_keeps(storage: Storage) -> str:
    if storage.code_bits:
        return f"its derivative in {storage.code_bits} bits"
    return "its input is made again" if storage.hidden == "again" else "its input (ReLU: its output)"


def _block_keeps(storage: Storage) -> str:
    return "its input; all else is computed again" if storage.block == "checkpoint" else "all of it, in host memory"


def _gated_keeps(storage: Storage) -> str:
    if storage.code_bits:  # codes of 2 bits would say too little of these
        return f"the factors of its gradients in {max(storage.code_bits, 4)} bits"
    return "gate and up are made again" if storage.hidden == "again" else "gate and up"


_SEED = "an 8-byte seed"
_FASTER = "fastln's kernels store and compute only what is needed"
_FROZEN = "its weight is frozen"

STAND_INS: dict[str, Row] = {
    "layer_norm": Row("norms", "fastln", _norm_keeps, False, _FASTER, _norm(LayerNorm)),
    "norm": Row("norms", "fastln", _norm_keeps, False, _FASTER, _norm(Norm)),
    "slow_norm": Row(None, "stock code", "what stock keeps", False, "fastln has no fast form of it", _norm(StockNorm)),
    "model_dtype": Row(None, "stays as it is", "-", False, "its first parameter is a norm's, now float32", _own_dtype),
    "dropout": Row("dropout", "fastln", _SEED, False, "no mask is stored", _swap(Dropout)),
    "calls_dropout": Row("dropout", "fastln", _SEED, False, "no mask is stored", _swap(CallsDropout)),
    "activation": Row("activations", "fastln", _activation_keeps, False, _FASTER, _activation),
    "post_norm": Row(
        trick="post_norms",
        becomes="fastln",
        keeps=_post_norm_keeps,
        has_products=False,
        reason="no sum is stored",
        put=_swap(DenseDropoutAddNorm),
    ),
    "gated_mlp": Row("gated_mlps", "fastln", _gated_keeps, False, "no product is stored", _swap(GatedMLP)),
    "attention": Row("attention", "fastln", _attention_keeps, True, _FASTER, _attention),
    "blip_attention": Row("attention", "fastln", _attention_keeps, True, _FASTER, _swap(BlipAttention)),
    "blip_text_attention": Row("attention", "fastln", _attention_keeps, True, _FASTER, _swap(BlipTextSelfAttention)),
    "rotary": Row("rotary", "fastln", "cosines and sines", False, "one pass in place of five", _rotary),
    "lm_head": Row(
        "late_logits", "computed late", "rows with a label", True, "most logits are never read", _swap(LMHead)
    ),
    "linear": Row("linears", "fastln", "nothing", True, _FROZEN, _swap(Linear)),
    "conv1d": Row("linears", "fastln", "nothing", True, _FROZEN, _swap(Conv1D)),
    "patches": Row("linears", "fastln", "nothing", True, _FROZEN, _swap(Patches)),
    "int8_linear": Row("linears", "fastln", "nothing", True, _FROZEN, _int8(Int8Linear)),
    "int8_conv1d": Row("linears", "fastln", "nothing", True, _FROZEN, _int8(Int8Conv1D)),
    "last_block": Row(
        trick="late_rows",
        becomes="computed late",
        keeps="rows that are read",
        has_products=False,
        reason="most rows of the last block are never read",
        put=_last_block,
    ),
    "cache": Row("cache", "none in training", "no keys and values", False, "training uses no cache", _no_cache),
    "checkpointing": Row(
        trick="checkpointing",
        becomes="without reentry",
        keeps="what they keep",
        has_products=False,
        reason="reentrant checkpoints send no gradient to layers behind frozen ones",
        put=_no_reentry,
    ),
    "block": Row(None, "fastln", _block_keeps, False, "the storage mode asks for it", _block),
    "random_head": Row(
        "random_heads", "trains whole", "what stock keeps", False, "it was not in the checkpoint", _nothing
    ),
    "arena": Row("arena", "fastln", "-", False, "memory of freed tensors is reused", _arena),
}

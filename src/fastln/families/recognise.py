"""Find everything in a model that fastln has a stand-in for, and return it as data. Nothing changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from fastln.families.activations import activation_kind, is_activation
from fastln.families.attention import find_attention
from fastln.families.blocks import calls_dropout, gated_mlp_kind, is_post_norm_end
from fastln.families.heads import find_heads
from fastln.families.last_block import last_blocks
from fastln.families.norms import find_other_norms, is_norm, is_stock_layer_norm, norm_kind
from fastln.families.parts import arguments_before_cache, needs_cache, output_embeddings, pretrained_models
from fastln.families.patches import is_patch_embedding
from fastln.families.rotary import rotary_function
from fastln.ops import ActivationKind


@dataclass(frozen=True)
class Found:
    """A module that fastln recognises.

    Attributes:
        name: The module's name in the model; empty for the model itself.
        what: Which part it is: a key of `fastln.standins.table.STAND_INS`.
        label: What it is, in words for the user: LayerNorm, GELU, attention, ...
        detail: Details such as which norm or activation it computes; None if there are none.
        obstacle: Why it must stay stock; None if it may change.
    """

    name: str
    what: str
    label: str
    detail: Any = None
    obstacle: str | None = None


def recognise(model: nn.Module) -> list[Found]:
    """Return everything that fastln recognises in `model`, grouped by kind, each kind in the model's order."""
    attention = [Found(found.name, found.what, "attention", obstacle=found.obstacle) for found in find_attention(model)]
    own_way = {found.name for found in attention if found.what != "attention"}
    found = [
        *attention,
        *(part for name, module in model.named_modules() if name not in own_way for part in _of(name, module)),
        *_other_norms(model),
        *_heads(model),
        *_linears(model),
        *(Found(block.projection, "last_block", "last block", block.name) for block in last_blocks(model)),
        *_steps(model),
    ]
    return [_unless_replaced(entry, model) for entry in found]


_NOT_BY_FORWARD = ("attention", "last_block", "cache", "checkpointing")


def _unless_replaced(entry: Found, model: nn.Module) -> Found:
    """Keep a module stock if it has its own forward, not its class's: a stand-in's forward would not be called."""
    if entry.obstacle or entry.what in _NOT_BY_FORWARD or "forward" not in vars(model.get_submodule(entry.name)):
        return entry
    return replace(entry, obstacle="its forward is replaced, as hooks of accelerate do")


_ACTIVATIONS: dict[ActivationKind, str] = {
    "gelu": "GELU",
    "gelu_tanh": "GELU (tanh)",
    "quick_gelu": "QuickGELU",
    "silu": "SiLU",
    "relu": "ReLU",
}


def _of(name: str, module: nn.Module) -> Iterator[Found]:
    """Yield what a module is by itself: at most one entry."""
    cls = type(module).__name__
    if is_norm(module):
        yield _norm(name, module)
    elif type(module) is nn.Dropout:
        yield Found(name, "dropout", "dropout")
    elif (kind := activation_kind(module)) is not None:
        yield Found(name, "activation", _ACTIVATIONS[kind], kind)
    elif is_activation(module):
        yield Found(name, "activation", cls, obstacle="fastln has no such activation")
    elif is_post_norm_end(module):
        yield Found(name, "post_norm", "post-norm block end")
    elif (kind := gated_mlp_kind(module)) is not None:
        yield Found(name, "gated_mlp", "gated MLP", kind)
    elif calls_dropout(module):
        yield Found(name, "calls_dropout", "dropout called as a function")
    elif (function := rotary_function(module)) is not None:
        yield Found(name, "rotary", "rotary positions", function)


def _norm(name: str, module: nn.Module) -> Found:
    if is_stock_layer_norm(module):
        return Found(name, "layer_norm", "LayerNorm")
    kind = norm_kind(module)
    if kind is None:
        return Found(name, "slow_norm", type(module).__name__, obstacle="fastln has no fast form of it")
    return Found(name, "norm", "LayerNorm" if kind.centre else "RMSNorm", kind)


def _other_norms(model: nn.Module) -> Iterator[Found]:
    for name, module in find_other_norms(model):
        reason = "norm tuning leaves out group and batch norms, and norms whose scale comes from a layer inside them"
        yield Found(name, "slow_norm", type(module).__name__, obstacle=reason)


def _heads(model: nn.Module) -> Iterator[Found]:
    heads = find_heads(model)
    names = {id(module): name for name, module in model.named_modules()}
    others: dict[str, str] = {}
    for _, part in pretrained_models(model):
        head = output_embeddings(part)
        if head is not None and (name := names.get(id(head))) is not None and name not in heads:
            others[name] = type(head).__name__
    yield from (Found(name, "lm_head", "lm_head") for name in heads)
    for name, cls in others.items():
        yield Found(name, "lm_head", "lm_head", obstacle=f"the head is a {cls}, not a plain torch.nn.Linear")


def _steps(model: nn.Module) -> Iterator[Found]:
    for name, part in pretrained_models(model):
        if (n_before := arguments_before_cache(part)) is not None:
            obstacle = "the model computes something else without it" if needs_cache(part) else None
            yield Found(name, "cache", "key-value cache", n_before, obstacle)
        if any(isinstance(module, GradientCheckpointingLayer) for module in part.modules()):
            yield Found(name, "checkpointing", "activation checkpoints")


def _linears(model: nn.Module) -> Iterator[Found]:
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            yield Found(name, "linear", "linear layer")
        elif type(module) is Conv1D:
            yield Found(name, "conv1d", "linear layer")
        elif is_patch_embedding(module):
            yield Found(name, "patches", "patch embedding")

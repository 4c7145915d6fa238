"""Which stock modules a stand-in computes: recognised by their code, for transformers' families share it by copying."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.bert.modeling_bert import BertSelfOutput
from transformers.models.llama.modeling_llama import LlamaMLP

from fastln.families.activations import activation_kind
from fastln.families.norms import is_norm, is_stock_layer_norm, norm_kind
from fastln.standins.modules import (
    Activation,
    DenseDropoutAddNorm,
    Dropout,
    GatedMLP,
    LayerNorm,
    Norm,
    calls_dropout,
    stand_in,
)


def use_stand_ins(model: nn.Module, backend: str) -> list[str]:
    """Have fastln compute the norms, activations, dropouts and the blocks made of them, in place.

    Args:
        model: Any module.
        backend: A name from `fastln.ops.backends.BACKENDS`.

    Returns:
        The names of the norms that keep their stock code, since fastln has no fast form of them.
    """
    slow = []
    for name, module in list(model.named_modules()):
        if is_norm(module):
            if not _use_norm(module, backend):
                slow.append(name)
        elif type(module) is nn.Dropout:
            stand_in(module, Dropout, backend)
        elif (kind := activation_kind(module)) is not None:
            stand_in(module, Activation, backend, kind)
        elif _computes(module, BertSelfOutput) and _is_post_norm(module):
            stand_in(module, DenseDropoutAddNorm, backend)
        elif _computes(module, LlamaMLP) and (kind := activation_kind(module.act_fn)) is not None:
            stand_in(module, GatedMLP, backend, kind)
        elif _calls_dropout(type(module).forward) and not _holds_layers(module):
            stand_in(module, calls_dropout(type(module)), backend)
    return slow


def _use_norm(norm: nn.Module, backend: str) -> bool:
    if is_stock_layer_norm(norm):
        stand_in(norm, LayerNorm, backend)
    elif (kind := norm_kind(norm)) is not None:
        stand_in(norm, Norm, backend, kind)
    else:
        return False
    return True


def _is_post_norm(module: nn.Module) -> bool:
    """Whether the norm and the dropout are the ones that the fused operation has."""
    norm = module.LayerNorm
    return (
        isinstance(norm, nn.LayerNorm)
        and is_stock_layer_norm(norm)
        and norm.elementwise_affine
        and type(module.dropout) is nn.Dropout
    )


def _computes(module: nn.Module, stock: type[nn.Module]) -> bool:
    """Whether the forward of `module` is, word for word, that of the class `stock`."""
    return _same_code(type(module).forward, stock.forward)


def _holds_layers(module: nn.Module) -> bool:
    """Whether it is a model, or has layers that may be computed again in the backward, outside of its forward."""
    layers = (inner for inner in module.modules() if isinstance(inner, GradientCheckpointingLayer))
    return isinstance(module, PreTrainedModel) or any(layer is not module for layer in layers)


@functools.cache
def _calls_dropout(forward: Callable[..., Any]) -> bool:
    """Whether this code calls `torch.nn.functional.dropout`, under its usual names, or a `dropout_add` that does."""
    forward = inspect.unwrap(forward)
    if not isinstance(forward, FunctionType):
        return False
    names = [instruction.argval for instruction in dis.get_instructions(forward)]
    if any(pair in (("functional", "dropout"), ("F", "dropout")) for pair in itertools.pairwise(names)):
        return True
    helpers = [forward.__globals__.get(name) for name in forward.__code__.co_names if "dropout_add" in name]
    return any(_calls_dropout(helper) for helper in helpers if helper is not None)


def _same_code(a: Callable[..., Any], b: Callable[..., Any]) -> bool:
    if not isinstance(a, FunctionType) or not isinstance(b, FunctionType):
        return False
    return _essence(a.__code__) == _essence(b.__code__)


def _essence(code: CodeType) -> tuple[Any, ...]:
    return code.co_code, code.co_names, code.co_varnames, code.co_consts[1:], code.co_freevars

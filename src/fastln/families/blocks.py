"""Recognise blocks that fastln computes in one operation, by their code: transformers' families copy it."""

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
from fastln.families.norms import is_stock_layer_norm
from fastln.ops import ActivationKind


def is_post_norm_end(module: nn.Module) -> bool:
    """Whether `module` computes `LayerNorm(dropout(dense(x)) + residual)`, the end of BERT's sub-blocks."""
    if not _same_code(type(module).forward, BertSelfOutput.forward):
        return False
    norm = module.LayerNorm
    return (
        isinstance(norm, nn.LayerNorm)
        and is_stock_layer_norm(norm)
        and norm.elementwise_affine
        and type(module.dropout) is nn.Dropout
    )


def gated_mlp_kind(module: nn.Module) -> ActivationKind | None:
    """Return the activation of a gated MLP, `down_proj(act_fn(gate_proj(x)) * up_proj(x))`; None for anything else."""
    if not _same_code(type(module).forward, LlamaMLP.forward):
        return None
    return activation_kind(module.get_submodule("act_fn"))


def calls_dropout(module: nn.Module) -> bool:
    """Whether the forward of `module` itself, not of layers inside it, calls dropout as a function."""
    return _calls_dropout(type(module).forward) and not _holds_layers(module)


def _holds_layers(module: nn.Module) -> bool:
    """Whether it is a model, or has layers that backward may compute again, outside its forward."""
    layers = (inner for inner in module.modules() if isinstance(inner, GradientCheckpointingLayer))
    return isinstance(module, PreTrainedModel) or any(layer is not module for layer in layers)


@functools.cache
def _calls_dropout(forward: Callable[..., Any]) -> bool:
    """Whether this code calls `functional.dropout` or `F.dropout`, or a `dropout_add` function that does."""
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

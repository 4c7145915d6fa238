"""Tell which part of a transformer a module is: attention, feed-forward network, word embeddings or head.

This depends on what modules are and where they are in the model, not on lists of models:

- *Attention* is a module whose class name ends in "Attention" and that is not inside another such module.
  transformers' families and torch's `MultiheadAttention` follow this naming.
- A *block* is a module that directly holds attention. Its linear maps outside attention are its *feed-forward network*.
- *Word embeddings* and *output embeddings* are what transformers' accessors return. The *head* is what a task model has
  in addition to its base model.

A *linear map* owns a matrix, or a stack of matrices with one per expert: `nn.Linear`, transformers' `Conv1D`, torch's
fused `in_proj_weight`, routers and experts. Convolutions, embeddings and norms are not linear maps.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

CACHE = ("use_cache", "past_key_values")
"""The arguments of a forward that decide about a key-value cache."""

_MATRIX = re.compile(r"(weight|proj)$")


def attention_maps(model: nn.Module) -> dict[str, nn.Module]:
    """Return by name the linear maps of all self- and cross-attention: query, key, value and output projections."""
    prefixes = tuple(f"{name}." for name in outermost_attention(model))
    return {
        name: module
        for name, module in model.named_modules()
        if _is_linear_map(module) and f"{name}.".startswith(prefixes)
    }


def ffn_maps(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """Return the linear maps of each block's feed-forward network: by block, then by name, in the model's order."""
    attention = outermost_attention(model)
    inside = tuple(f"{name}." for name in attention)
    # If blocks are nested, the innermost one counts.
    blocks = sorted({_parent(name) for name in attention}, key=len, reverse=True)
    found: dict[str, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if _is_linear_map(module) and not f"{name}.".startswith(inside):
            block = next((block for block in blocks if not block or name.startswith(f"{block}.")), None)
            if block is not None:
                found.setdefault(block, {})[name] = module
    return found


def embedding_parameters(model: nn.Module) -> list[str]:
    """Return the names of the word embeddings' parameters, without positions, token types, patches and class tokens."""
    wanted = {
        id(parameter)
        for _, part in pretrained_models(model)
        if (embeddings := input_embeddings(part)) is not None
        for parameter in embeddings.parameters()
    }
    return [name for name, parameter in model.named_parameters() if id(parameter) in wanted]


def head_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters of output embeddings and of all that a task model adds to its base model."""
    wanted = set()
    for _, part in pretrained_models(model):
        if (head := output_embeddings(part)) is not None:
            wanted |= {id(parameter) for parameter in head.parameters()}
        if part.base_model is not part:
            base = {id(parameter) for parameter in part.base_model.parameters()}
            wanted |= {id(parameter) for parameter in part.parameters()} - base
    return [name for name, parameter in model.named_parameters() if id(parameter) in wanted]


def own_parameters(modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the parameters that the given modules own directly."""
    return [
        f"{name}.{own}" if name else own
        for name, module in modules.items()
        for own, _ in module.named_parameters(recurse=False)
    ]


def outermost_attention(model: nn.Module) -> list[str]:
    """Return the names of the attention modules that are not inside other attention modules."""
    found: list[str] = []
    for name, module in model.named_modules():
        if name and type(module).__name__.endswith("Attention") and not name.startswith(tuple(f"{n}." for n in found)):
            found.append(name)
    return found


def blocks_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the blocks of a model, each with the layers in it that transformers can checkpoint, in the model's order.

    A block is an entry of a list of modules (the outermost one around it) that holds attention or such a layer.
    """
    layers = [name for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    outermost = [name for name in layers if not _inside(name, layers)]
    blocks = {name: block for name in (*outermost, *outermost_attention(model)) if (block := block_name(name))}
    order = [name for name, _ in model.named_modules() if name in blocks.values()]
    return {block: tuple(name for name in outermost if blocks.get(name) == block) for block in order}


def block_name(module: str) -> str:
    """Return the name of the block that a module is in, by its name: that up to the first number; "" if it has none."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def _inside(name: str, others: list[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


def _is_linear_map(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
        return False
    return any(_MATRIX.search(own) and parameter.dim() > 1 for own, parameter in module.named_parameters(recurse=False))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def pretrained_models(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield (name, module) for every transformers model in `model`, including itself, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            yield name, module


def arguments_before_cache(model: PreTrainedModel) -> int | None:
    """Return how many arguments of the forward come before one that decides about a key-value cache.

    Returns:
        None if the model cannot be told to make no cache.
    """
    names = list(inspect.signature(model.forward).parameters)
    return min(names.index(name) for name in CACHE if name in names) if "use_cache" in names else None


def needs_cache(model: PreTrainedModel) -> bool:
    """Whether the forward of a model, or of a model inside it, does something else if it is told to make no cache."""
    classes: set[type] = {type(part) for _, part in pretrained_models(model)}
    return any(_branches_without_cache(cls) for cls in classes)


@functools.cache
def _branches_without_cache(cls: Any) -> bool:
    """Whether the code of the forward has `not use_cache`, as FSMT's, which then makes a causal mask."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))
    except (OSError, TypeError, SyntaxError):  # code without a source file
        return False
    negated = (
        node.operand for node in ast.walk(tree) if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    )
    return any(isinstance(operand, ast.Name) and operand.id == "use_cache" for operand in negated)


def input_embeddings(model: PreTrainedModel) -> nn.Embedding | None:
    """Return a model's word embeddings; None if it has none."""
    embeddings = _ask(model, "get_input_embeddings")
    return embeddings if isinstance(embeddings, nn.Embedding) else None


def output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Return the layer that computes a model's logits; None if it has no such layer."""
    return _ask(model, "get_output_embeddings")


def _ask(model: PreTrainedModel, accessor: str) -> nn.Module | None:
    try:
        return getattr(model, accessor)()
    except (AttributeError, NotImplementedError):  # raised by classes without such embeddings
        return None

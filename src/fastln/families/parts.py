"""Which part of a transformer a module is: attention, feed-forward network, word embeddings, head.

Found by what modules are and where they stand, not by lists of models:

- *attention* is a module whose class name ends in "Attention" (transformers' families keep to that, torch's
  `MultiheadAttention` too) and that stands in no other such module;
- a *block* is what directly holds attention; its linear maps outside attention are its *feed-forward network*;
- *word embeddings* and *output embeddings* are what transformers' accessors say, and the *head* is what a model for a
  task has beside its base model.

A *linear map* owns a matrix (or a stack of them, one an expert): `nn.Linear`, transformers' `Conv1D`, torch's fused
`in_proj_weight`, routers and experts. Convolutions, embeddings and norms are none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

_MATRIX = re.compile(r"(weight|proj)$")


def attention_maps(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear maps of all attention, self and cross, by name: query, key, value and output projections."""
    prefixes = tuple(f"{name}." for name in outermost_attention(model))
    return {
        name: module
        for name, module in model.named_modules()
        if _is_linear_map(module) and f"{name}.".startswith(prefixes)
    }


def ffn_maps(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """Return, by block, the linear maps of its feed-forward network by name, in the block's order."""
    attention = outermost_attention(model)
    inside = tuple(f"{name}." for name in attention)
    # The innermost block counts, where a block holds another.
    blocks = sorted({_parent(name) for name in attention}, key=len, reverse=True)
    found: dict[str, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if _is_linear_map(module) and not f"{name}.".startswith(inside):
            block = next((block for block in blocks if not block or name.startswith(f"{block}.")), None)
            if block is not None:
                found.setdefault(block, {})[name] = module
    return found


def embedding_parameters(model: nn.Module) -> list[str]:
    """Return the names of the word embeddings' parameters: not of positions, token types, patches, class tokens."""
    wanted = {
        id(parameter)
        for _, part in pretrained_models(model)
        if isinstance(embeddings := _ask(part, "get_input_embeddings"), nn.Embedding)
        for parameter in embeddings.parameters()
    }
    return [name for name, parameter in model.named_parameters() if id(parameter) in wanted]


def head_parameters(model: nn.Module) -> list[str]:
    """Return the names of parameters of output embeddings, and of what a model for a task has beside its base."""
    wanted = set()
    for _, part in pretrained_models(model):
        if (head := output_embeddings(part)) is not None:
            wanted |= {id(parameter) for parameter in head.parameters()}
        if part.base_model is not part:
            base = {id(parameter) for parameter in part.base_model.parameters()}
            wanted |= {id(parameter) for parameter in part.parameters()} - base
    return [name for name, parameter in model.named_parameters() if id(parameter) in wanted]


def own_parameters(modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the parameters that the modules, given by name, own themselves."""
    return [
        f"{name}.{own}" if name else own
        for name, module in modules.items()
        for own, _ in module.named_parameters(recurse=False)
    ]


def outermost_attention(model: nn.Module) -> list[str]:
    """Return the names of the modules that are attention and stand in no other attention."""
    found: list[str] = []
    for name, module in model.named_modules():
        if name and type(module).__name__.endswith("Attention") and not name.startswith(tuple(f"{n}." for n in found)):
            found.append(name)
    return found


def _is_linear_map(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
        return False
    return any(_MATRIX.search(own) and parameter.dim() > 1 for own, parameter in module.named_parameters(recurse=False))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def pretrained_models(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield (name, module) of every transformers model in `model`, itself among them, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            yield name, module


def output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Return what a model makes its logits with; None where it has no such layer."""
    return _ask(model, "get_output_embeddings")


def _ask(model: PreTrainedModel, accessor: str) -> nn.Module | None:
    try:
        return getattr(model, accessor)()
    except (AttributeError, NotImplementedError):  # what classes without such embeddings do
        return None

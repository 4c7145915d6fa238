"""Find the sub-models that a scope names: vision, text, decoder, projector."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

from fastln.errors import FastLNError
from fastln.families.parts import head_parameters

# The attribute names of each sub-model in transformers' classes.
SCOPES: dict[str, tuple[str, ...]] = {
    "vision": ("vision", "vision_model", "vision_tower", "vision_encoder", "visual", "image_model"),
    "text": ("text", "text_model", "text_encoder", "qformer"),
    "decoder": ("text_decoder", "decoder", "language_model"),
    "projector": (
        "multi_modal_projector",
        "mm_projector",
        "visual_projection",
        "text_projection",
        "language_projection",
        "connector",
        "merger",
        "deepstack_merger_list",
    ),
}
_SCOPE_OF = {name: scope for scope, names in SCOPES.items() for name in names}


def sub_models(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of each sub-model's parameters, by scope, in the model's order.

    A sub-model inside another belongs to the outer one, except for a projector, which is always separate. The head of
    the whole model belongs to its decoder. A parameter is in at most one sub-model. A task head is in none.
    """
    prefixes = _prefixes(model)
    found: dict[str, list[str]] = {scope: [] for scope in dict.fromkeys(prefixes.values())}
    head = set(head_parameters(model)) if "decoder" in found else set()
    for name, _ in model.named_parameters():
        # The longest prefix is the innermost sub-model.
        prefix = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
        if prefix is not None:
            found[prefixes[prefix]].append(name)
        elif name in head:
            found["decoder"].append(name)
    return {scope: names for scope, names in found.items() if names}


def parameters_in(model: nn.Module, scope: str | Iterable[str] | None) -> set[str]:
    """Return the names of the parameters inside `scope`, without those that no output depends on.

    Args:
        model: The model.
        scope: One or several keys of `SCOPES`; None for everything.

    Raises:
        FastLNError: If a scope is unknown, or the model does not have it.
    """
    if scope is None:
        return {name for name, _ in model.named_parameters()} - _unused(model)
    wanted = (scope,) if isinstance(scope, str) else tuple(scope)
    if not wanted:
        raise FastLNError("scope is empty: nothing would be tuned; leave it out to tune every sub-model")
    present = sub_models(model)
    for key in wanted:
        if key not in SCOPES:
            near = difflib.get_close_matches(key, SCOPES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise FastLNError(f"unknown scope {key!r}{hint} (valid: {', '.join(SCOPES)})")
        if key not in present:
            raise FastLNError(
                f"scope {key!r} matches nothing in {type(model).__name__} (it has: {', '.join(present) or 'none'})"
            )
    return {name for key in wanted for name in present[key]} - _unused(model)


def _prefixes(model: nn.Module) -> dict[str, str]:
    """Return the scope of each sub-model, by the prefix of its parameters' names (with the final dot)."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        scope = _SCOPE_OF.get(leaf)
        if leaf == "encoder" and _is_tower(getattr(model.get_submodule(parent), "decoder", None)):
            scope = "vision" if getattr(module, "main_input_name", None) == "pixel_values" else "text"
        if scope == "projector" or (scope and _is_tower(module) and not name.startswith(tuple(found))):
            found[f"{name}."] = scope
    return found


def _is_tower(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, nn.Linear)  # BERT's `decoder` is a linear layer


def _unused(model: nn.Module) -> set[str]:
    """Return the names of vision parameters after the layer whose output the model uses (LLaVA: the last but one).

    The loss does not depend on what the tower registers after that layer, such as its last norm and its pooling.
    """
    layers = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    if layers is None:
        return set()
    unused: set[str] = set()
    for prefix in (prefix for prefix, scope in _prefixes(model).items() if scope == "vision"):
        tower = model.get_submodule(prefix[:-1])
        stack = next((part for part in tower.modules() if isinstance(part, nn.ModuleList)), None)
        if stack is None:
            continue
        # hidden_states starts with the embeddings: entry n is the output of layer n.
        taken = [layer if layer >= 0 else len(stack) + 1 + layer for layer in _as_list(layers)]
        used = max(taken)
        if used < len(stack):
            names = [name for name, _ in tower.named_parameters()]
            beyond = {id(parameter) for parameter in stack[used].parameters()}
            first = next(i for i, parameter in enumerate(tower.parameters()) if id(parameter) in beyond)
            unused |= {prefix + name for name in names[first:]}
    return unused


def _as_list(layers: int | list[int]) -> list[int]:
    return [layers] if isinstance(layers, int) else list(layers)

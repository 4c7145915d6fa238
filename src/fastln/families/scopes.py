"""Find the sub-models that a scope names: vision, text, decoder, projector."""

from __future__ import annotations

import difflib
import fnmatch
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
NOT = "not:"  # before an entry of a scope that leaves something out
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
        scope: One or several entries; None for everything. An entry is a sub-model (a key of `SCOPES`) or a pattern of
            module names, such as `encoder.layer.1?` or `*.post_layernorm` (`fnmatch`'s rules; `*` also matches dots).
            `not:` before an entry leaves it out. If all entries leave something out, the rest of the model is inside.

    Raises:
        FastLNError: If an entry is unknown, or the model does not have it.
    """
    inside = {name for name, _ in model.named_parameters()}
    if scope is not None:
        wanted = (scope,) if isinstance(scope, str) else tuple(scope)
        if not wanted:
            raise FastLNError("scope is empty: nothing would be tuned; leave it out to tune every sub-model")
        if not leaves_out_only(wanted):
            inside = {name for key in wanted if not key.startswith(NOT) for name in _in_one(model, key)}
        for key in wanted:
            if key.startswith(NOT):
                inside -= _in_one(model, key.removeprefix(NOT))
    return inside - _unused(model)


def leaves_out_only(scope: str | Iterable[str]) -> bool:
    """Whether every entry of a scope leaves something out."""
    return all(key.startswith(NOT) for key in ((scope,) if isinstance(scope, str) else scope))


def parts_left_out(scope: str | Iterable[str] | None) -> list[str]:
    """Return the entries of a scope that leave something out."""
    return [key for key in ((scope,) if isinstance(scope, str) else scope or ()) if key.startswith(NOT)]


def _in_one(model: nn.Module, key: str) -> set[str]:
    """Return the names of the parameters of one sub-model, or of the modules that match a pattern."""
    modules = [name for name, _ in model.named_modules() if name]
    found = tuple(f"{name}." for name in fnmatch.filter(modules, key))
    if key in SCOPES:
        present = sub_models(model)
        if key in present:
            return set(present[key])
        if not found:
            has = f"it has: {', '.join(present)}" if present else "it has no sub-models; name modules"
            raise FastLNError(f"scope {key!r} matches nothing in {type(model).__name__} ({has})")
    if not found:
        near = difflib.get_close_matches(key, [*SCOPES, *modules], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FastLNError(
            f"unknown scope {key!r}{hint} (valid: {', '.join(SCOPES)}, or a pattern of module names; {NOT} before one "
            "leaves it out)"
        )
    inside = {name for name, _ in model.named_parameters() if name.startswith(found)}
    if not inside:
        raise FastLNError(f"scope {key!r}: {found[0][:-1]} has no parameter of its own in {type(model).__name__}")
    return inside


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

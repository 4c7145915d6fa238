"""The sub-models that a scope names, and where the transformers families keep them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn

from fastln.errors import FastLNError

# The attribute names under which transformers' classes hold each sub-model, outermost first.
SCOPES: dict[str, tuple[str, ...]] = {
    "vision": ("vision", "vision_model", "vision_tower", "visual"),
    "text": ("text", "text_model", "text_encoder"),
    "decoder": ("text_decoder", "decoder", "language_model"),
    "projector": ("multi_modal_projector", "visual_projection", "text_projection"),
}


def scope_prefixes(model: nn.Module, scope: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the name prefixes (each ending in a dot) of the modules inside `scope`; ("",) for the whole model.

    Args:
        model: the model.
        scope: one or several keys of `SCOPES`; None for everything.

    Raises:
        FastLNError: for an unknown scope, or one that this model does not have.
    """
    if scope is None:
        return ("",)
    wanted = (scope,) if isinstance(scope, str) else tuple(scope)
    if not wanted:
        raise FastLNError("scope is empty: nothing would be tuned; leave it out to tune every sub-model")
    present = {key: found for key, names in SCOPES.items() if (found := _prefixes(model, names))}
    for key in wanted:
        if key not in SCOPES:
            near = difflib.get_close_matches(key, SCOPES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise FastLNError(f"unknown scope {key!r}{hint} (valid: {', '.join(SCOPES)})")
        if key not in present:
            raise FastLNError(
                f"scope {key!r} matches nothing in {type(model).__name__} (it has: {', '.join(present) or 'none'})"
            )
    return tuple(prefix for key in wanted for prefix in present[key])


def _prefixes(model: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    found: list[str] = []
    for name, _ in model.named_modules():
        if name.rsplit(".", 1)[-1] in names and not any(name.startswith(prefix) for prefix in found):
            found.append(f"{name}.")
    return tuple(found)

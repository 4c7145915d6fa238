"""Models without weights, on torch's meta device: enough to plan what `prepare` would do."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from fastln.errors import FastLNError, loading
from fastln.models.blip_task import embedded_config
from fastln.models.dual_encoder import DualEncoder
from fastln.models.shapes import FAMILIES, is_shape, parse_shape
from fastln.models.sources import bare_configuration, check_source, expanded_sources, saved_model


def outline(spec: str) -> PreTrainedModel:
    """Build a model on the meta device from only its configuration. No weight is read, no memory allocated.

    Args:
        spec: A directory, a hub name, a configuration's .json file (`blip:` or `chat:` may stand before these), a
            folder that `fastln train` wrote, or a shape such as `BertForMaskedLM:8x128`.

    Raises:
        FastLNError: If it is none of these, or transformers has no such model.
    """
    if is_shape(spec):
        shape = parse_shape(spec)
        with torch.device("meta"):
            return FAMILIES[shape.family].make(shape.size, shape.n_layers)
    spec = expanded_sources(spec)
    kind, _, rest = spec.partition(":")
    if kind == "dual":
        raise FastLNError(
            f"model {spec!r}: the size of its head depends on the data, so there is no plan without: give one of its "
            "encoders or a folder that `fastln train` wrote, or see fastln train --dry-run"
        )
    if spec == "blip":
        with torch.device("meta"):
            return transformers.BlipForQuestionAnswering(embedded_config())
    source = saved_model(rest if kind in ("blip", "chat") else spec)
    bare = bare_configuration(source)
    if bare is None:
        check_source(source)
    with loading(source):
        config = AutoConfig.from_pretrained(bare or source)
        model_class = _model_class(source, config)
        with torch.device("meta"):
            return model_class.from_config(config) if model_class is AutoModel else model_class._from_config(config)


def _model_class(source: str, config: PreTrainedConfig) -> Any:
    """Return the class that the configuration names; `AutoModel` if it names none."""
    names = config.architectures or []
    if not names:
        return AutoModel
    known = getattr(transformers, names[0], None) or {DualEncoder.__name__: DualEncoder}.get(names[0])
    if known is None:
        raise FastLNError(f"{source}: its config.json names the class {names[0]!r}, which transformers does not have")
    return known

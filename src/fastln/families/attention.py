"""fastln's attention behind transformers' attention interface.

transformers looks an attention function up by the name in each configuration, at every call. Importing this module adds
the name "fastln" to the functions and, with the mask that sdpa gets, to the masks; `use_fast_attention` puts the name
into the configurations of a model. Modules that do not ask the interface (BLIP's, Falcon's) are left alone.
"""

import inspect
import sys
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fastln.ops.attention import attention, uses_blocked

NAME = "fastln"


def fast_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own sdpa function, with the same arguments and the same result.

    Args:
        module: The attention module; its `is_causal` counts where the argument is None.
        query: (B, H, Sq, D).
        key: (B, Hk, Sk, D).
        value: (B, Hk, Sk, D).
        attention_mask: Boolean or additive, broadcastable to (B, H, Sq, Sk), or None.
        dropout: Probability to drop an attention weight.
        scaling: Factor on the scores, 1/sqrt(D) by default.
        is_causal: Whether query i sees keys 0..i only, when there is no mask.
        kwargs: What else the module passes on. Position biases, paged caches and the like go to sdpa.

    Returns:
        The output (B, Sq, H, D), contiguous, and None for the attention weights.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    n_queries = query.shape[2]
    causal = is_causal and attention_mask is None and n_queries > 1
    if _uses_more_than(kwargs) or not uses_blocked(
        query, key, value, causal=causal, mask=attention_mask, dropout=dropout
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    if causal:  # an empty static cache is longer than the queries
        key, value = key[:, :, :n_queries], value[:, :, :n_queries]
    out = attention(query, key, value, scale=scaling, causal=causal, mask=attention_mask)
    return out.transpose(1, 2).contiguous(), None


def _uses_more_than(kwargs: dict[str, Any]) -> bool:
    """Whether a module passes on something that changes the result: sdpa knows it, or refuses it with its reason."""
    return bool(kwargs.get("output_attentions")) or any(
        kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap")
    )


AttentionInterface.register(NAME, fast_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_fast_attention(model: nn.Module) -> list[PreTrainedConfig]:
    """Send the attention of every sub-model that now uses sdpa through fastln, in place.

    The choice is never saved: `save_pretrained` leaves the attention implementation out of config.json.

    Args:
        model: A `PreTrainedModel`, or a module that contains some.

    Returns:
        The configurations changed, for `restore_attention`; empty where nothing goes through the interface.
    """
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    fixed = {id(module.config) for module in models if not _asks_interface(module)}
    configs = {id(module.config): module.config for module in models}
    changed = [config for key, config in configs.items() if key not in fixed and config._attn_implementation == "sdpa"]
    for config in changed:
        config._attn_implementation_internal = NAME  # the public setter would reach into the sub-configurations
    return changed


def _asks_interface(model: PreTrainedModel) -> bool:
    """Whether the model's code takes its attention from the interface and nowhere depends on the name "sdpa"."""
    if not model._can_set_attn_implementation():
        return False
    return '_attn_implementation == "sdpa"' not in inspect.getsource(sys.modules[type(model).__module__])


def restore_attention(changed: list[PreTrainedConfig]) -> None:
    """Give sdpa back to the configurations that `use_fast_attention` changed.

    Args:
        changed: What `use_fast_attention` returned.
    """
    for config in changed:
        config._attn_implementation_internal = "sdpa"

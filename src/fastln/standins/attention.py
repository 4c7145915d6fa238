"""fastln's attention in transformers' models.

Most families ask transformers' attention interface, which looks a function up by the name in the configuration, at
every call. Importing this module adds the name "fastln" to the functions and, with the mask that sdpa gets, to the
masks; `use_fast_attention` puts the name into the configurations of a model. Of the classes that compute attention
themselves BLIP's have a stand-in here; the others (Falcon's) are left alone.
"""

import inspect
import sys
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention
from transformers.utils import is_flash_attn_2_available, output_capturing
from transformers.utils.output_capturing import _active_collector

from fastln.ops.attention import attention, has_own
from fastln.standins.modules import Part, stand_in, unwatched

NAME = "fastln"
FLASH_ATTENTION = "flash_attention_2"


def use_fast_attention(model: nn.Module) -> list[PreTrainedConfig]:
    """Send the attention of every sub-model that computes it by sdpa, or by itself, through the fastest way, in place.

    That is fastln's own on CPU; on CUDA flash-attn, where it is installed and the model takes it, else sdpa. What was
    set to "eager" by choice stays so. The choice is never saved: `save_pretrained` leaves the attention implementation
    out of config.json.

    Args:
        model: A `PreTrainedModel`, or a module that contains some.

    Returns:
        The configurations changed, for `restore_attention`. Modules that became stand-ins are given back by
        `fastln.standins.modules.stand_back`.
    """
    for module in model.modules():
        if type(module) in _STAND_INS:
            stand_in(module, _STAND_INS[type(module)])
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    fixed = {id(module.config) for module in models if not _asks_interface(module)}
    changed = []
    for module in models:
        config, name = module.config, _implementation(module)
        if id(config) not in fixed and config._attn_implementation == "sdpa" and name != "sdpa":
            config._attn_implementation_internal = name  # the public setter would reach into the sub-configurations
            changed.append(config)
    return changed


def restore_attention(changed: list[PreTrainedConfig]) -> None:
    """Give sdpa back to the configurations that `use_fast_attention` changed and nobody has changed since.

    Args:
        changed: What `use_fast_attention` returned.
    """
    for config in changed:
        if config._attn_implementation in (NAME, FLASH_ATTENTION):
            config._attn_implementation_internal = "sdpa"


def _asks_interface(model: PreTrainedModel) -> bool:
    """Whether the model's code takes its attention from the interface and nowhere depends on the name "sdpa"."""
    if not model._can_set_attn_implementation():
        return False
    return '_attn_implementation == "sdpa"' not in inspect.getsource(sys.modules[type(model).__module__])


def _implementation(model: PreTrainedModel) -> str:
    if model.device.type == "cpu":
        return NAME
    half = model.dtype.itemsize == 2
    if model.device.type == "cuda" and half and model._supports_flash_attn and is_flash_attn_2_available():
        return FLASH_ATTENTION
    return "sdpa"


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
    if _uses_more_than(kwargs) or not has_own(query, key, value, mask=attention_mask, dropout=dropout):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    n_queries = query.shape[2]
    causal = is_causal and attention_mask is None and n_queries > 1
    if causal:  # an empty static cache is longer than the queries
        key, value = key[:, :, :n_queries], value[:, :, :n_queries]
    out = attention(query, key, value, scale=scaling, causal=causal, mask=attention_mask, dropout=dropout)
    return out.transpose(1, 2).contiguous(), None


def _uses_more_than(kwargs: dict[str, Any]) -> bool:
    """Whether a module passes on something that changes the result: sdpa knows it, or refuses it with its reason."""
    return bool(kwargs.get("output_attentions")) or any(
        kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap")
    )


AttentionInterface.register(NAME, fast_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


class _FastBlipAttention(BlipAttention):
    """BLIP's vision attention: one projection for queries, keys and values."""

    _fastln: Part

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return what the stock module does of `hidden_states` (B, S, D), no weights unless they are seen."""
        if _weights_are_seen(self):
            return super().forward(hidden_states, **kwargs)
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        out = attention(q, k, v, scale=self.scale, dropout=_probability(self.dropout))
        return self.projection(out.transpose(1, 2).flatten(2)), None


class _FastBlipTextSelfAttention(BlipTextSelfAttention):
    """BLIP's text attention, over the tokens themselves or an encoder's; with a cache stock code serves."""

    _fastln: Part

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the stock module does, no weights unless they are seen.

        Args:
            hidden_states: (B, Sq, D).
            attention_mask: Additive, broadcastable to (B, H, Sq, Sk), over the tokens themselves.
            encoder_hidden_states: (B, Sk, D), what keys and values are made of; None for the tokens themselves.
            encoder_attention_mask: Likewise, over these.
            past_key_values: Keys and values of earlier tokens.
            kwargs: What else the model passes on.
        """
        if past_key_values is not None or _weights_are_seen(self):
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values, **kwargs
            )
        seen, mask = hidden_states, attention_mask
        if encoder_hidden_states is not None:
            seen, mask = encoder_hidden_states, encoder_attention_mask
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
            for projection, x in ((self.query, hidden_states), (self.key, seen), (self.value, seen))
        )
        out = attention(q, k, v, mask=mask, dropout=_probability(self.dropout))
        return out.transpose(1, 2).flatten(2), None


_STAND_INS: dict[type[nn.Module], type[nn.Module]] = {
    BlipAttention: _FastBlipAttention,
    BlipTextSelfAttention: _FastBlipTextSelfAttention,
}


def _weights_are_seen(module: BlipAttention | BlipTextSelfAttention) -> bool:
    """Whether `output_attentions=True` asks for attention weights, or a hook of somebody's would see them."""
    asked = any(key.endswith("attentions") for key in _active_collector.get() or ())
    # Of transformers' own hooks on the module, which stay once they were needed, the collector says all.
    hooked = any(hook.__module__ != output_capturing.__name__ for hook in module._forward_hooks.values())
    return asked or hooked or not unwatched(module.dropout)


def _probability(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0

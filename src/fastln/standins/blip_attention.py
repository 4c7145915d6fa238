"""BLIP's attention, which does not use transformers' attention interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.utils import output_capturing
from transformers.utils.output_capturing import _active_collector

from fastln.ops.attention import attention
from fastln.standins.part import StandIn, form


@form
class BlipAttention(StandIn):
    """BLIP's vision attention, with one projection for queries, keys and values."""

    COMPUTES = ("dropout",)

    qkv: nn.Module
    projection: nn.Module
    dropout: nn.Dropout
    num_heads: int
    head_dim: int
    scale: float

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return what the stock module returns for `hidden_states` (B, S, D); attention weights only if needed."""
        if _weights_are_seen(self):
            return super().forward(hidden_states, **kwargs)
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        part = self._fastln
        out = attention(
            q,
            k,
            v,
            scale=self.scale,
            dropout=_probability(self.dropout),
            settings=part.settings,
            reader=part.reader,
        )
        return self.projection(out.transpose(1, 2).flatten(2)), None


@form
class BlipTextSelfAttention(StandIn):
    """BLIP's text attention: self-attention, or cross-attention to an encoder. With a cache, stock code runs."""

    COMPUTES = ("dropout",)

    query: nn.Module
    key: nn.Module
    value: nn.Module
    dropout: nn.Dropout
    attention_head_size: int

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the stock module returns; attention weights only if needed.

        Args:
            hidden_states: (B, Sq, D).
            attention_mask: Additive mask for self-attention, broadcastable to (B, H, Sq, Sk).
            encoder_hidden_states: (B, Sk, D), the source of keys and values; None for self-attention.
            encoder_attention_mask: Additive mask for cross-attention, broadcastable to (B, H, Sq, Sk).
            past_key_values: Keys and values of earlier tokens.
            kwargs: Further arguments from the model.
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
        part = self._fastln
        out = attention(
            q, k, v, mask=mask, dropout=_probability(self.dropout), settings=part.settings, reader=part.reader
        )
        return out.transpose(1, 2).flatten(2), None


def _weights_are_seen(module: StandIn) -> bool:
    """Whether attention weights are needed: for `output_attentions=True`, a user's hook, or another dropout."""
    asked = any(key.endswith("attentions") for key in _active_collector.get() or ())
    # Ignore transformers' own hooks. They stay after their first use, and the collector says whether they are active.
    hooked = any(hook.__module__ != output_capturing.__name__ for hook in module._forward_hooks.values())
    return asked or hooked or not module._has_stock_children()


def _probability(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0

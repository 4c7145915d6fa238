"""The end of a post-norm block, as in BERT."""

from __future__ import annotations

from torch import Tensor, nn

from fastln import ops
from fastln.ops import NormKind
from fastln.standins.norm import warn_if_rounded
from fastln.standins.part import StandIn, form, own_parameter


@form
class DenseDropoutAddNorm(StandIn):
    """`LayerNorm(dropout(dense(x)) + residual)`, which stores only x_hat and a float32 per row."""

    COMPUTES = ("dropout", "LayerNorm")

    dense: nn.Module
    dropout: nn.Dropout
    LayerNorm: nn.LayerNorm

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Return what the stock module returns.

        Args:
            hidden_states: (..., n_in), the block's result.
            input_tensor: (..., n_cols), the residual.
        """
        if not self._has_stock_children():
            return super().forward(hidden_states, input_tensor)
        norm = self.LayerNorm
        weight, bias = own_parameter(norm, "weight"), own_parameter(norm, "bias")
        warn_if_rounded(weight)
        dropout = self.dropout.p if self.dropout.training else 0.0
        y = ops.dropout_add_norm(
            self.dense(hidden_states),
            input_tensor,
            weight,
            bias,
            NormKind(norm.eps),
            dropout=dropout,
            settings=self._fastln.settings,
            reader=self._fastln.reader,
        )
        assert isinstance(y, Tensor)
        return y

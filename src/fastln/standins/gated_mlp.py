"""Gated MLPs, as in Llama."""

from __future__ import annotations

from torch import Tensor, nn

from fastln import ops
from fastln.standins.part import StandIn, form


@form
class GatedMLP(StandIn):
    """`down_proj(act_fn(gate_proj(x)) * up_proj(x))`. It stores only the results of the gate and up projections."""

    COMPUTES = ("act_fn",)

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Return what the stock module returns for `x` (..., n_cols)."""
        if not self._has_stock_children():
            return super().forward(x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        part = self._fastln
        return self.down_proj(ops.gated_activation(gate, up, part.kind, settings=part.settings, reader=part.reader))

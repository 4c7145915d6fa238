"""Norms. Trained norms have float32 parameters whatever the model's dtype; their outputs keep the model's dtype."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastln import ops
from fastln.standins.part import StandIn, form


@form
class Norm(StandIn):
    """A norm with a `weight` and an optional `bias`, of the kind that `norm_kind` detected."""

    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise `hidden_states` (..., n_cols) over its last dimension; the output has the input's dtype."""
        warn_if_rounded(self.weight)
        part = self._fastln
        bias = getattr(self, "bias", None)
        y = ops.dropout_add_norm(hidden_states, None, self.weight, bias, part.kind, settings=part.settings)
        assert isinstance(y, Tensor)
        return y.to(output_dtype(hidden_states, part.dtype))


@form
class LayerNorm(StandIn):
    """`torch.nn.LayerNorm` over one dimension, computed by `fastln.ops.layer_norm`.

    γ and β may be float32 when the input has lower precision. The output has the input's dtype.
    """

    weight: Tensor
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` (..., n_cols) over its last dimension."""
        warn_if_rounded(self.weight)
        part = self._fastln
        y = ops.layer_norm(input, self.weight, self.bias, self.eps, settings=part.settings)
        return y.to(output_dtype(input, part.dtype))


@dataclass
class Float32Parameters:
    """Casts 16-bit trained parameters of a norm to float32, and can cast them back.

    In bfloat16 a step of 1e-4 on a weight of 1.0 is lost to rounding.

    Attributes:
        norm: The norm.
        dtypes: The earlier dtype of each trained parameter, by its own name.
    """

    norm: nn.Module
    dtypes: dict[str, torch.dtype]

    def put(self) -> None:
        """Cast the parameters to float32."""
        for name in self.dtypes:
            parameter = self.norm.get_parameter(name)
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))

    def remove(self) -> None:
        """Cast the parameters back. This rounds the tuned values to the model's dtype."""
        for name, dtype in self.dtypes.items():
            parameter = self.norm.get_parameter(name)
            parameter.data = parameter.data.to(dtype)


@dataclass(frozen=True)
class StockOutput:
    """A forward hook on a norm that trains in float32 with its stock code.

    A float32 weight promotes the output of stock code, but the rest of the model expects its own dtype.

    Attributes:
        dtype: The 16-bit dtype that the norm's parameters had before `prepare`; None if they had no 16-bit dtype.
    """

    dtype: torch.dtype | None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the output in the dtype that the model expects."""
        return output.to(output_dtype(args[0], self.dtype))


def output_dtype(x: Tensor, stock: torch.dtype | None) -> torch.dtype:
    """Return the dtype that the model expects from a norm of `x`.

    Usually it is the dtype of `x`. But some code, such as Mamba's, casts the norm's input to the dtype of its weight,
    which is float32 now. Then the expected dtype is the weight's original dtype.

    Args:
        x: The input of the norm.
        stock: The 16-bit dtype that the norm's parameters had before `prepare`; None if they had no 16-bit dtype.
    """
    return stock if stock is not None and x.dtype == torch.float32 else x.dtype


def warn_if_rounded(weight: Tensor | None) -> None:
    """Warn if a trained norm was cast to 16 bits after `prepare` made it float32."""
    if weight is None or not weight.requires_grad or weight.dtype.itemsize >= 4 or torch.compiler.is_compiling():
        return
    warnings.warn(
        f"a trained norm has {weight.dtype} parameters, in which a step of 1e-4 on a weight of 1.0 rounds to nothing: "
        "the model was cast after fastln.prepare(); restore it and prepare it again",
        stacklevel=3,
    )

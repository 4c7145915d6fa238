"""Norms. Trained norms have float32 parameters whatever the model's dtype; the rest of the model sees its own dtype."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastln import ops
from fastln.families.readers import code_that_reads
from fastln.ops import NormKind
from fastln.standins.part import Part, StandIn, form, own_parameter


class _Shown:
    """A parameter of a norm. Code of the model that reads it from outside the norm gets it in the model's own dtype.

    Examples are `x.to(self.norm.weight.dtype)` and `rms_norm(x, self.norm.weight)`. Everyone else gets the parameter.
    """

    def __set_name__(self, owner: type[nn.Module], name: str) -> None:
        self._name = name

    def __get__(self, norm: Any, owner: type[nn.Module] | None = None) -> Any:
        if norm is None:
            return self
        value = norm.__getattr__(self._name)
        part: Part = norm._fastln
        if part.dtype is None or not part.readers or value is None:
            return value
        # A compiler knows no frames. There, only code outside gets here.
        is_outside = torch.compiler.is_compiling() or sys._getframe(1).f_code in code_that_reads(part.readers)
        return value.to(part.dtype) if is_outside else value


class _WithOwnDtype(StandIn):
    """The parameters of a norm that some code reads from outside."""

    weight: Any = _Shown()
    bias: Any = _Shown()


@form
class Norm(_WithOwnDtype):
    """A norm with a `weight` and an optional `bias`, of the kind that `norm_kind` detected."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise `hidden_states` (..., n_cols) over its last dimension; the output has the input's dtype."""
        weight, bias = own_parameter(self, "weight"), own_parameter(self, "bias")
        warn_if_rounded(weight)
        part = self._fastln
        if part.widens and weight.dtype == torch.float32 and hidden_states.dtype.itemsize == 2:
            hidden_states = hidden_states.float()
        y = ops.dropout_add_norm(
            hidden_states, None, weight, bias, part.kind, settings=part.settings, reader=part.reader
        )
        assert isinstance(y, Tensor)
        return y.to(output_dtype(hidden_states, part))


@form
class LayerNorm(_WithOwnDtype):
    """`torch.nn.LayerNorm` over one dimension, computed by `fastln.ops`.

    γ and β may be float32 when the input has lower precision. The output has the input's dtype.
    """

    eps: float

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` (..., n_cols) over its last dimension."""
        weight, bias = own_parameter(self, "weight"), own_parameter(self, "bias")
        warn_if_rounded(weight)
        part = self._fastln
        y = ops.dropout_add_norm(
            input, None, weight, bias, NormKind(self.eps), settings=part.settings, reader=part.reader
        )
        assert isinstance(y, Tensor)
        return y.to(output_dtype(input, part))


@form
class StockNorm(_WithOwnDtype):
    """A norm that trains in float32 with its stock code."""


def in_own_dtype(norm: StockNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Return the output of a `StockNorm` in the dtype that the model expects; a forward hook.

    A float32 weight promotes the results of stock code, but the rest of the model expects its own dtype. A hook also
    reaches a norm whose forward someone has replaced.
    """
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if x is None:
        return output
    dtype = output_dtype(x, norm._fastln)
    return tree_map_only(Tensor, lambda y: y.to(dtype) if y.is_floating_point() else y, output)


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


def output_dtype(x: Tensor, part: Part) -> torch.dtype:
    """Return the dtype that the model expects from a norm of `x`.

    Usually it is the dtype of `x`. For a float32 `x` in a model of 16 bits, it is what stock code would return.
    """
    return part.of_float32 if part.of_float32 is not None and x.dtype == torch.float32 else x.dtype


def warn_if_rounded(weight: Tensor | None) -> None:
    """Warn if a trained norm was cast to 16 bits after `prepare` made it float32."""
    if weight is None or not weight.requires_grad or weight.dtype.itemsize >= 4 or torch.compiler.is_compiling():
        return
    warnings.warn(
        f"a trained norm has {weight.dtype} parameters, in which a step of 1e-4 on a weight of 1.0 rounds to nothing: "
        "the model was cast after fastln.prepare(); restore it and prepare it again",
        stacklevel=3,
    )

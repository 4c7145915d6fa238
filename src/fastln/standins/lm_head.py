"""Language-model heads that compute only the logits that are read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastln.late.logits import LazyLogits
from fastln.late.when import may_be_late
from fastln.ops.backends import implementation
from fastln.standins.int8 import Int8Spec
from fastln.standins.part import StandIn, form, unwatched
from fastln_kernels.reference_int8 import Weight8

_HELD = "_fastln_rounded"  # the weight, its version and memory, and its 8-bit form


@form
class LMHead(StandIn):
    """A language-model head that defers its logits in training. See `fastln.late.logits.LazyLogits`.

    Stock code computes the logits immediately in evaluation, without autograd, under `torch.compile` and other
    transforms, and if the head has hooks. Hooks need to see the logits, and they may gather the weight before the call
    and release it afterwards.
    """

    weight: Tensor
    bias: Tensor | None
    out_features: int

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits (..., out_features) of `input` (..., in_features)."""
        if self._may_wait(input):
            return LazyLogits.of(input, self.weight, self.bias, self._rounded())
        return super().forward(input)

    def _rounded(self) -> Weight8 | None:
        """Return the weight in 8 bits, beside the weight, which embeddings may share; None for exact products."""
        part, weight = self._fastln, self.weight
        if not self._is_rounded() or not weight.is_cpu:
            return None
        held, state = self.__dict__.get(_HELD), (weight._version, weight.data_ptr())
        if held is None or held[0] is not weight or held[1] != state:
            kernels = implementation("int8_linear", weight, part.settings)
            held = (weight, state, kernels.quantise_weight(weight.detach(), turned=part.kind.turned))
            self.__dict__[_HELD] = held
        return held[2]

    def _is_rounded(self) -> bool:
        trains = any(p is not None and p.requires_grad for p in (self.weight, self.bias))
        return isinstance(self._fastln.kind, Int8Spec) and not trains

    def tensors_beside(self) -> list[Tensor]:
        """Return the parts of the weight in 8 bits, which the first late logits make."""
        held = self.__dict__.get(_HELD)
        if held is not None and held[0] is self.weight:
            return [part for part in held[2] if isinstance(part, Tensor)]
        if not self._is_rounded() or self.weight.is_cuda:
            return []
        values = torch.empty(self.weight.shape, dtype=torch.int8, device="meta")
        made = Weight8.of(values, values.new_empty(len(values), dtype=torch.float32), False)
        return [part for part in made if isinstance(part, Tensor)]

    def _may_wait(self, input: Tensor) -> bool:
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        return (
            self.training
            and may_be_late(input)
            and all(type(parameter) is nn.Parameter for parameter in parameters)
            and any(t.requires_grad for t in (input, *parameters))
            and self.out_features > 1
            and _dtypes_fit({t.dtype for t in (input, *parameters)}, input.device.type)
            and unwatched(self)
        )


def _dtypes_fit(dtypes: set[torch.dtype], device: str) -> bool:
    """Whether a linear layer accepts these dtypes. Autocast, if it is on, casts all of them to its own dtype."""
    return torch.float64 not in dtypes if torch.is_autocast_enabled(device) else len(dtypes) == 1

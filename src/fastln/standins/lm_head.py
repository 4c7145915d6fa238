"""Language-model heads that compute only the logits that are read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastln.late.logits import LazyLogits
from fastln.late.when import may_be_late
from fastln.standins.part import StandIn, form, unwatched


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
            return LazyLogits.of(input, self.weight, self.bias)
        return super().forward(input)

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

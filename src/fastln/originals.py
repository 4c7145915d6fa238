"""What is remembered of a frozen weight that a model no longer holds, because its 8-bit form took its place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

ATTRIBUTE = "_fastln_originals"
"""The attribute of a module that has its `Original`s, by the parameter's own name.

Such a module has a method `check_originals`, which raises a `FastLNError` if what took their place was changed since.
"""

N_SAMPLED = 64


@dataclass(frozen=True)
class Original:
    """A parameter that was replaced.

    Attributes:
        samples: The values that a fingerprint covers, as `sampled` gives them, in the parameter's own dtype.
        dtype: That dtype.
    """

    samples: Tensor
    dtype: torch.dtype


def sampled(values: Tensor) -> Tensor:
    """Return about 64 values of a flat tensor, evenly apart."""
    return values[:: max(1, len(values) // N_SAMPLED)]


def originals(model: nn.Module) -> dict[str, Original]:
    """Return the originals of the parameters that were replaced, by the parameters' names in the model.

    Raises:
        FastLNError: If what took their place was changed since.
    """
    found: dict[str, Original] = {}
    for prefix, module in model.named_modules():
        held: dict[str, Original] = module.__dict__.get(ATTRIBUTE, {})
        if held:
            module.check_originals()
        found |= {f"{prefix}.{own}" if prefix else own: original for own, original in held.items()}
    return found

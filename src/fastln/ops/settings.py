"""What every operation is told beside its tensors, as one object."""

from __future__ import annotations

from dataclasses import dataclass

STORAGES = ("exact",)
"""What an operation may keep for backward; `exact`: what its gradients need, in full."""

PRODUCTS = ("exact",)
"""In which form matrix products run; `exact`: in the model's own dtype."""


@dataclass(frozen=True, slots=True)
class OpSettings:
    """How operations run: one frozen object that travels whole from the plan to the kernels.

    Attributes:
        backend: A name from `fastln.ops.backends.BACKENDS`.
        storage: A name from `STORAGES`.
        products: A name from `PRODUCTS`.
    """

    backend: str = "auto"
    storage: str = "exact"
    products: str = "exact"


DEFAULT = OpSettings()
REFERENCE = OpSettings(backend="reference")

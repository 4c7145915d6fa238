"""Settings that say how operations run; every operation takes them besides its tensors."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from difflib import get_close_matches

from fastln.errors import FastLNError

BACKENDS = ("auto", "triton", "cpu", "reference")
"""Which kernels compute; `auto` takes the fastest for the device."""


@dataclass(frozen=True, slots=True)
class Storage:
    """What operations keep for backward.

    Attributes:
        x_hat_bits: The bits of each number of x_hat that norms keep; None for their input, or x_hat, in full.
        again: Whether what frozen linear layers make of a norm's result is made again in the backward where attention
            or a norm of heads needs it: queries, keys and values.
        hidden: What activations keep: "kept" for their input, "again" to have a frozen layer make it again, or the bits
            of each number of their derivative.
        block: What happens to a whole block: "checkpoint" keeps its input alone and computes all of it again, "offload"
            moves what its operations keep to the host's memory until the backward; None for neither.
    """

    x_hat_bits: int | None = None
    again: bool = False
    hidden: str | int = "kept"
    block: str | None = None

    @property
    def code_bits(self) -> int | None:
        """The bits of each number of an activation's derivative; None if it is not kept as codes."""
        return self.hidden if isinstance(self.hidden, int) else None


STORAGES = {
    "exact": Storage(),
    "again": Storage(again=True),
    "recompute": Storage(again=True, hidden="again"),
    "compressed": Storage(x_hat_bits=8, hidden=8),
    "compressed-4": Storage(x_hat_bits=8, hidden=4),
    "compressed-2": Storage(x_hat_bits=8, hidden=2),
    "compressed-again": Storage(x_hat_bits=8, again=True, hidden=8),
    "compressed-4-again": Storage(x_hat_bits=8, again=True, hidden=4),
    "compressed-2-again": Storage(x_hat_bits=8, again=True, hidden=2),
    "compressed-recompute": Storage(x_hat_bits=8, again=True, hidden="again"),
    "checkpoint": Storage(block="checkpoint"),
    "offload": Storage(block="offload"),
}
"""What operations may keep for backward, by the name for `activations`."""

PRODUCTS = ("exact", "int8")
"""How matrix products are computed; `exact`: in the model's own dtype; `int8`: frozen linear layers in 8 bits."""


@dataclass(frozen=True, slots=True)
class OpSettings:
    """How operations run; one frozen object is passed whole from the plan to the kernels.

    torch's operators take only scalars here. They get the fields as `flat`, and `of` rebuilds the settings from them.

    Attributes:
        backend: A name from `BACKENDS`.
        storage: A name from `STORAGES`.
        products: A name from `PRODUCTS`.

    Raises:
        FastLNError: If one of these is not a valid name.
    """

    backend: str = "auto"
    storage: str = "exact"
    products: str = "exact"

    def __post_init__(self) -> None:
        for name, valid in (("backend", BACKENDS), ("storage", STORAGES), ("products", PRODUCTS)):
            value = getattr(self, name)
            if value not in valid:
                near = get_close_matches(str(value).lower(), valid, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                option = "activations" if name == "storage" else name  # the user-facing name
                raise FastLNError(f"unknown {option} {value!r}{hint}; valid: {', '.join(valid)}")

    @property
    def keeps(self) -> Storage:
        """What operations keep for backward."""
        return STORAGES[self.storage]

    @property
    def flat(self) -> tuple[str, ...]:
        """The fields in order, as arguments of an operator; `SCHEMA` declares them."""
        return tuple([getattr(self, name) for name in _NAMES])

    @staticmethod
    @functools.cache
    def of(*flat: str) -> OpSettings:
        """Rebuild the settings from the scalars of `flat`."""
        return OpSettings(*flat)


_NAMES = tuple(field.name for field in fields(OpSettings))

SCHEMA = ", ".join(f"str {name}" for name in _NAMES)
"""How an operator's schema declares the settings."""

N_FLAT = len(_NAMES)
"""The number of scalars in the settings."""

DEFAULT = OpSettings()
REFERENCE = OpSettings(backend="reference")

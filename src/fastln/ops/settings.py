"""How operations run: one frozen object that every operation takes beside its tensors."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from difflib import get_close_matches

from fastln.errors import FastLNError

BACKENDS = ("auto", "triton", "cpu", "reference")
"""Whose kernels compute; `auto` takes the fastest that the device has."""

STORAGES = ("exact",)
"""What an operation may keep for backward; `exact`: what its gradients need, in full."""

PRODUCTS = ("exact",)
"""In which form matrix products run; `exact`: in the model's own dtype."""


@dataclass(frozen=True, slots=True)
class OpSettings:
    """How operations run: one frozen object that travels whole from the plan to the kernels.

    Operators of torch take scalars alone: they get the settings as `flat`, and `of` makes the settings of that again.

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
                near = get_close_matches(str(value), valid, n=1)
                hint = f" (did you mean {near[0]!r}?)" if near else ""
                option = "activations" if name == "storage" else name  # as a user knows it
                raise FastLNError(f"unknown {option} {value!r}{hint}; valid: {', '.join(valid)}")

    @property
    def flat(self) -> tuple[str, ...]:
        """The fields in order: arguments of an operator, which `SCHEMA` declares."""
        return tuple([getattr(self, name) for name in _NAMES])

    @staticmethod
    @functools.cache
    def of(*flat: str) -> OpSettings:
        """Return the settings of which these are the `flat`."""
        return OpSettings(*flat)


_NAMES = tuple(field.name for field in fields(OpSettings))

SCHEMA = ", ".join(f"str {name}" for name in _NAMES)
"""How an operator's signature declares the settings."""

N_FLAT = len(_NAMES)
"""How many scalars the settings are."""

DEFAULT = OpSettings()
REFERENCE = OpSettings(backend="reference")

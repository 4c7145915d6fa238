"""What a model is set up with: the method, the engine that runs it, and how fastln's operations run, in one object."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from fastln.errors import FastLNError
from fastln.methods import RANDOM_HEADS, get_method, settle_scope
from fastln.ops import OpSettings
from fastln.plan import settle_without

EXACT = "exact"


@dataclass(frozen=True)
class MethodSettings:
    """The arguments of `fastln.engines.put_method`, in one form. They travel together from the options to the plan.

    Attributes:
        method: A name from `fastln.methods.METHODS`, or one code per sub-model.
        engine: `fastln`, `torch` or `peft`.
        scope: The parts to tune; None for all.
        also: Names of further modules that train in full.
        without: Names of what `prepare` leaves out.
        backend: The backend of fastln's operations.
        activations: What they keep for backward.
        memory_budget: How much memory a step may take; None for as much as it takes.
        products: The form in which matrix products run.
        keep_weights: Whether the weights that 8-bit ones replace stay in memory.
    """

    method: str
    engine: str
    scope: str | tuple[str, ...] | None = None
    also: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    backend: str = "auto"
    activations: str = EXACT
    products: str = EXACT
    keep_weights: bool = False
    memory_budget: float | str | None = None

    @classmethod
    def of(
        cls,
        method: str = "layernorm",
        engine: str | None = None,
        *,
        scope: str | Iterable[str] | None = None,
        also: str | Iterable[str] = (),
        without: str | Iterable[str] = (),
        backend: str = "auto",
        activations: str = EXACT,
        memory_budget: float | str | None = None,
        products: str = EXACT,
        keep_weights: bool = False,
    ) -> MethodSettings:
        """Check the arguments of `put_method`, as far as that needs no model.

        Raises:
            FastLNError: For an unknown name, or for anything that changes how a model runs, with an engine other than
                `fastln`.
        """
        method, scope = settle_scope(method, scope)
        chosen, engine = get_method(method, engine)
        left_out = settle_without(without)
        OpSettings(backend, activations, products)  # raises for an unknown name
        if engine != "fastln":
            runs_it = "fastln" in chosen.engines
            hint = ", which runs this method too: say so (engine='fastln', or --engine fastln)" if runs_it else ""
            if names := [name for name in left_out if name != RANDOM_HEADS]:
                raise FastLNError(
                    f"engine {engine!r} runs stock code, so there is nothing to leave out: without {', '.join(names)} "
                    f"is for engine 'fastln'{hint}"
                )
            given: dict[str, tuple[Any, Any]] = {
                "backend": (backend, "auto"),
                "activations": (activations, EXACT),
                "memory_budget": (memory_budget, None),
                "products": (products, EXACT),
                "keep_weights": (keep_weights, False),
            }
            for name, (value, usual) in given.items():
                if value != usual:
                    raise FastLNError(
                        f"engine {engine!r} runs stock code: {name} {value!r} is for engine 'fastln'{hint}"
                    )
        also = (also,) if isinstance(also, str) else tuple(also)
        return cls(method, engine, scope, also, left_out, backend, activations, products, keep_weights, memory_budget)

    @property
    def of_plan(self) -> dict[str, Any]:
        """The arguments of `fastln.plan` after the model."""
        names = [field.name for field in fields(self) if field.name != "engine"]
        return {name: getattr(self, name) for name in names}

"""What trains: the registry of tuning methods, and how each is put on a model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from fastln.errors import FastLNError
from fastln.families import find_norms, scope_prefixes


@dataclass(frozen=True)
class Method:
    """One tuning method.

    Attributes:
        name: as given to `prepare` and on the command line.
        description: one line for help texts.
        engines: who can run it; the first is the default.
        learning_rate: what moves its parameters well by default (the task head has a rate of its own).
        select: from a model to the names of the parameters that it trains; None where peft decides.
    """

    name: str
    description: str
    engines: tuple[str, ...]
    learning_rate: float
    select: Callable[[nn.Module], Iterable[str]] | None


def norm_parameters(model: nn.Module) -> list[str]:
    """Return the names of the parameters that the model's norms own."""
    return [f"{name}.{own}" for name, norm in find_norms(model) for own, _ in norm.named_parameters(recurse=False)]


def _biases(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"]


def _everything(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _nothing(model: nn.Module) -> list[str]:
    return []


HEAD_LEARNING_RATE = 1e-3
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("layernorm", "γ and β of every norm", ("fastln", "peft", "torch"), 3e-3, norm_parameters),
        Method("lora", "low-rank updates (r 8) of the query and value projections", ("peft",), 5e-4, None),
        Method("bitfit", "every bias", ("fastln", "torch"), 1e-3, _biases),
        Method("full", "every parameter", ("fastln", "torch"), 5e-5, _everything),
        Method("head", "nothing but the task head", ("fastln", "torch"), HEAD_LEARNING_RATE, _nothing),
    )
}
LORA_RANK = 8
LORA_TARGETS = re.compile(r"(^|\.)(query|value|q_proj|v_proj|q_lin|v_lin|qkv|c_attn|query_key_value)$")


def get_method(name: str, engine: str | None = None) -> tuple[Method, str]:
    """Look a method up, and the engine to run it with.

    Args:
        name: a key of `METHODS`.
        engine: one of the method's engines; the first by default.

    Raises:
        FastLNError: for an unknown method, or an engine that does not run it; the message lists the valid choices.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FastLNError(f"unknown method {name!r}{hint} (valid: {', '.join(METHODS)})")
    method = METHODS[name]
    engine = engine or method.engines[0]
    if engine not in method.engines:
        raise FastLNError(f"method {name!r} does not run on engine {engine!r} (valid: {', '.join(method.engines)})")
    return method, engine


def select_parameters(
    model: nn.Module, method: Method, scope: str | Iterable[str] | None, also: Iterable[str] = ()
) -> set[str]:
    """Return the names of the parameters that train.

    Args:
        model: the model.
        method: what trains.
        scope: the sub-models to tune; all by default.
        also: names of modules that train whatever the method (a task head that starts random).

    Raises:
        FastLNError: if the method is peft's, the scope is unknown, nothing of the method is inside the scope, or a
            module of `also` does not exist.
    """
    if method.select is None:
        raise FastLNError(f"method {method.name!r} runs on engine 'peft' only")
    prefixes = scope_prefixes(model, scope)
    chosen = {name for name in method.select(model) if name.startswith(prefixes)}
    if not chosen and method.select is not _nothing:
        where = "the model" if scope is None else f"scope {scope!r}"
        raise FastLNError(f"method {method.name!r} matches nothing in {where} of {type(model).__name__}")
    for module in also:
        inside = {name for name, _ in model.named_parameters() if name.startswith(f"{module}.")}
        if not inside:
            raise FastLNError(f"there is no module {module!r} with parameters in {type(model).__name__}, to train also")
        chosen |= inside
    return chosen


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters train and how many there are, shared ones counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

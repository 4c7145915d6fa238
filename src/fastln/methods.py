"""Tuning methods: their registry, the notation with one code per sub-model, and parameter counts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from torch import nn

from fastln.errors import FastLNError
from fastln.families import (
    find_norms,
    find_other_norms,
    leaves_out_only,
    parameters_in,
    parts_left_out,
    sub_models,
)
from fastln.families.heads import random_parts
from fastln.families.parts import attention_maps, embedding_parameters, ffn_maps, head_parameters, own_parameters


@dataclass(frozen=True)
class Method:
    """One tuning method.

    Attributes:
        name: The name for `prepare` and the command line.
        description: One line for help texts.
        engines: The engines that can run it. The first is the default.
        learning_rate: The default learning rate of its parameters. The task head has a separate default.
        select: A function from a model to the names of its parameters that train. None if peft adds the trained
            parameters.
        norm_learning_rate: The default learning rate of norms, if it differs from the rest.
    """

    name: str
    description: str
    engines: tuple[str, ...]
    learning_rate: float
    select: Callable[[nn.Module], Iterable[str]] | None
    norm_learning_rate: float | None = None


GROUPS = ("norms", "own", "head")
"""The groups of parameters that can have a learning rate each."""


@dataclass(frozen=True)
class LearningRates:
    """Peak learning rates of the schedule. Each attribute is one of the `GROUPS`.

    Attributes:
        own: For the method's own parameters, except norms.
        norms: For norms.
        head: For the task head.
    """

    own: float
    norms: float
    head: float

    def of(self, groups: Collection[str]) -> dict[str, float]:
        """Return the rates of these groups, by the groups' names."""
        return {group: getattr(self, group) for group in GROUPS if group in groups}


def norm_parameters(model: nn.Module) -> list[str]:
    """Return the names of all norms' parameters, including norms inside attention."""
    return [f"{name}.{own}" for name, norm in find_norms(model) for own, _ in norm.named_parameters(recurse=False)]


def attention_parameters(model: nn.Module) -> list[str]:
    """Return the names of the weights and biases of the query, key, value and output projections of attention."""
    return own_parameters(attention_maps(model))


def ffn_parameters(model: nn.Module) -> list[str]:
    """Return the names of the weights and biases of the feed-forward networks' linear maps."""
    return [name for maps in ffn_maps(model).values() for name in own_parameters(maps)]


def _biases(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[2].endswith("bias")]


def _everything(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _nothing(model: nn.Module) -> list[str]:
    return []


def _norms_and_biases(model: nn.Module) -> list[str]:
    return [*norm_parameters(model), *_biases(model)]


def _norms_and_ends(model: nn.Module) -> list[str]:
    connector = sub_models(model).get("projector", [])
    return [*norm_parameters(model), *connector, *embedding_parameters(model), *head_parameters(model)]


# Learning rates: those of layernorm, lora, bitfit and full were tuned on VQA-RAD (docs/benchmarks.md). The others have
# the order of magnitude that their papers use.
HEAD_LEARNING_RATE = 1e-3
_NORMS = 3e-3
_MATRICES = 5e-5
_OWN = ("fastln", "torch")
_PEFT = ("peft",)
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("layernorm", "γ and β of every norm", ("fastln", "peft", "torch"), _NORMS, norm_parameters),
        Method("layernorm+bias", "every norm and every bias", _OWN, 1e-3, _norms_and_biases, _NORMS),
        Method(
            "layernorm-full",
            "every norm, the projector, word embeddings and the output head (ICLR 2024, arXiv 2312.11420)",
            engines=_OWN,
            learning_rate=_MATRICES,
            select=_norms_and_ends,
            norm_learning_rate=_NORMS,
        ),
        Method("layernorm+lora", "every norm, and LoRA from peft", ("fastln",), 5e-4, None, _NORMS),
        Method("bitfit", "every bias", _OWN, 1e-3, _biases),
        Method("attention", "query, key, value and output projections", _OWN, _MATRICES, attention_parameters),
        Method("ffn", "the linear layers of the feed-forward networks", _OWN, _MATRICES, ffn_parameters),
        Method("full", "every parameter", _OWN, _MATRICES, _everything),
        Method("head", "only the task head", _OWN, HEAD_LEARNING_RATE, _nothing),
        Method("lora", "low-rank updates (r 8) of the query and value projections", ("peft", "fastln"), 5e-4, None),
        Method("dora", "LoRA that also trains the magnitudes of the weights", _PEFT, 5e-4, None),
        Method("adalora", "LoRA that moves rank to where it matters (r 12, pruned to 8)", _PEFT, 1e-3, None),
        Method("vera", "two vectors per projection, around shared random matrices (r 256)", _PEFT, 5e-3, None),
        Method("ia3", "scales of keys, values and feed-forward hidden units", _PEFT, 5e-3, None),
        Method("prefix", "20 trained keys and values in front of every layer's own", _PEFT, 1e-2, None),
        Method("p-tuning", "20 input vectors, generated by a small network", _PEFT, 1e-3, None),
        Method("prompt", "20 trained input vectors", _PEFT, 3e-2, None),
    )
}

FROZEN = "frozen"
"""Nothing of a model trains: for layers that are added to a prepared model. It is no tuning method by itself."""
_FROZEN = Method(FROZEN, "nothing", ("fastln",), 0.0, _nothing)

# The codes of arXiv 2404.16385: the parameters that each one trains in a sub-model, and their learning rate.
_CODES: dict[str, tuple[Callable[[nn.Module], Iterable[str]], float]] = {
    "T": (_everything, _MATRICES),
    "F": (_nothing, _MATRICES),
    "LN": (norm_parameters, _NORMS),
    "ATT": (attention_parameters, _MATRICES),
    "FFN": (ffn_parameters, _MATRICES),
}


def is_notation(name: object) -> bool:
    """Whether `name` is a notation with one code per sub-model: LN-F-T, T-F, LN, ..."""
    return isinstance(name, str) and all(code in _CODES for code in name.split("-"))


def settle_scope(method: str, scope: str | Iterable[str] | None) -> tuple[str, str | tuple[str, ...] | None]:
    """Return method and scope. A notation by sub-model replaces both: it becomes the method, and the scope None.

    Raises:
        FastLNError: If the notation is combined with another scope or another method.
    """
    scope = scope if scope is None or isinstance(scope, str) else tuple(scope)
    if isinstance(scope, str) and is_notation(scope):
        if method not in ("layernorm", scope):
            raise FastLNError(
                f"scope {scope!r} already says what trains in every sub-model; leave out the method {method!r}"
            )
        return scope, None
    if is_notation(method) and scope is not None and not leaves_out_only(scope):
        raise FastLNError(
            f"method {method!r} already says what trains in every sub-model; leave out the scope {scope!r}"
        )
    return method, scope


def get_method(name: str, engine: str | None = None) -> tuple[Method, str]:
    """Look up a method and the engine that runs it.

    Args:
        name: A key of `METHODS`, or one code (T, F, LN, ATT or FFN) per sub-model, joined by dashes.
        engine: One of the method's engines; the first by default.

    Raises:
        FastLNError: If the method is unknown or the engine does not run it. The message lists the valid choices.
    """
    if is_notation(name):
        method = _by_sub_model(name)
    elif name in METHODS:
        method = METHODS[name]
    elif name == FROZEN:
        method = _FROZEN
    else:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        codes = "or one code per sub-model, as in LN-F-T: T all, F none, LN norms, ATT attention, FFN feed-forward"
        raise FastLNError(f"unknown method {name!r}{hint} (valid: {', '.join(METHODS)}; {codes})")
    engine = engine or method.engines[0]
    if engine not in method.engines:
        raise FastLNError(f"method {name!r} does not run on engine {engine!r} (valid: {', '.join(method.engines)})")
    return method, engine


def learning_rates(
    method: str, own: float | None = None, *, norms: float | None = None, head: float | None = None
) -> LearningRates:
    """Return the learning rates of a method.

    Args:
        method: As for `get_method`.
        own: Rate of everything that trains, unless `norms` or `head` is given. None: each group has the method's
            default, and the head `HEAD_LEARNING_RATE`.
        norms: Rate of norms.
        head: Rate of the task head. Method `head` has only `own`.

    Raises:
        FastLNError: If the method is unknown.
    """
    chosen, _ = get_method(method)
    if norms is None:
        norms = (chosen.norm_learning_rate or chosen.learning_rate) if own is None else own
    if method == "head" or (head is None and own is not None):
        head = chosen.learning_rate if own is None else own
    elif head is None:
        head = HEAD_LEARNING_RATE
    return LearningRates(chosen.learning_rate if own is None else own, norms, head)


def _by_sub_model(notation: str) -> Method:
    codes = notation.split("-")

    def select(model: nn.Module) -> list[str]:
        parts = sub_models(model) or {"the whole model": _everything(model)}
        if len(codes) != len(parts):
            raise FastLNError(
                f"method {notation!r} has {len(codes)} codes, but {type(model).__name__} has "
                f"{len(parts)} sub-models: {', '.join(parts)}; give one code per sub-model, in this order"
            )
        chosen = []
        for code, (part, inside) in zip(codes, parts.items(), strict=True):
            found = set(_CODES[code][0](model)) & set(inside)
            if not found and code != "F":
                raise FastLNError(f"method {notation!r}: {code} matches nothing in {part} of {type(model).__name__}")
            chosen += [name for name in inside if name in found]
        if not chosen:
            raise FastLNError(f"method {notation!r} trains nothing: every code is F")
        return chosen

    rates = {code: _CODES[code][1] for code in codes if code not in ("F", "LN")}
    own_rate = min(rates.values(), default=_NORMS)
    return Method(notation, "by sub-model", _OWN, own_rate, select, _NORMS if "LN" in codes else None)


def select_parameters(
    model: nn.Module, method: Method, scope: str | Iterable[str] | None, also: Iterable[str] = ()
) -> set[str]:
    """Return the names of the model's own parameters that train.

    Args:
        model: The model.
        method: The tuning method.
        scope: The sub-models to tune; all by default.
        also: Names of modules that train in full, in addition to the method, such as a randomly initialised task head.

    Raises:
        FastLNError: If the method adds modules, the scope is unknown, the method selects nothing inside the scope, or a
            module in `also` does not exist.
    """
    if method.select is None:
        raise FastLNError(
            f"method {method.name!r} adds peft modules to the model, but prepare() only chooses among the model's own "
            "parameters; use FastLNTrainer, fastln train or fastln.engines.put_method instead"
        )
    if scope is not None and method.name == "head":
        raise FastLNError(
            f"method {method.name!r} trains the task head, which is in no sub-model: leave out the scope {scope!r}"
        )
    chosen = set(method.select(model)) & parameters_in(model, scope)
    if not chosen and method.select is not _nothing:
        where = "the model" if scope is None else f"scope {scope!r}"
        raise FastLNError(f"method {method.name!r} matches nothing in {where} of {type(model).__name__}")
    for module in also:
        inside = {name for name, _ in model.named_parameters() if name.startswith(f"{module}.")}
        if not inside:
            raise FastLNError(_no_parameters(model, module))
        chosen |= inside
    return chosen


@dataclass(frozen=True)
class RandomHeads:
    """What is random in a model that came from a checkpoint, and what becomes of it. See `random_heads`.

    Attributes:
        train: Names of the heads that train whole for this reason alone.
        frozen: Names of the heads that would, if the caller had not left them out.
        note: A sentence about what else is random and frozen; None if nothing is.
    """

    train: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    note: str | None = None


RANDOM_HEADS = "random_heads"
"""The name for `without` that leaves such heads frozen, whichever engine runs the method."""


def random_heads(
    model: nn.Module,
    trained: Collection[str],
    without: Collection[str] = (),
    scope: str | Iterable[str] | None = None,
) -> RandomHeads:
    """Decide what trains of the parts of a model that no checkpoint gave their values.

    Heads train; a frozen random head would keep the model at chance. Other parts, such as a whole tower, do not: they
    may be large, and more likely the wrong checkpoint was loaded.

    Args:
        model: The model.
        trained: Names of the parameters that train in any case.
        without: What the caller leaves out.
        scope: The parts to tune. A head is in no sub-model, so only an entry that leaves it out by name counts.
    """
    parts = random_parts(model)
    names = [name for name, _ in model.named_parameters()]

    def is_frozen(part: str) -> bool:
        return any((name == part or name.startswith(f"{part}.")) and name not in trained for name in names)

    heads = list(filter(is_frozen, parts.heads))
    left_out = parts_left_out(scope)
    inside = parameters_in(model, left_out) if heads and left_out else set(names)
    frozen = [head for head in heads if RANDOM_HEADS in without or not any(n.startswith(f"{head}.") for n in inside)]
    others = list(filter(is_frozen, parts.others))
    note = None
    if others:
        some = f"{', '.join(others[:3])}{f' and {len(others) - 3} more' if len(others) > 3 else ''}"
        note = (
            f"not in the checkpoint of {type(model).__name__}, so random, and frozen: {some}; load a checkpoint that "
            "has it, or train it with `also`"
        )
    return RandomHeads(tuple(head for head in heads if head not in frozen), tuple(frozen), note)


def _no_parameters(model: nn.Module, module: str) -> str:
    """Say why `also` finds nothing to train in a module: there is none, or another module shares all of its weights."""
    names_of = {parameter: name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.startswith(f"{module}."):
            owner = names_of[parameter].rpartition(".")[0]
            return (
                f"`also`: in {type(model).__name__}, {module!r} shares all its weights with {owner!r}, which holds "
                f"them; name {owner!r} instead"
            )
    return f"`also`: {type(model).__name__} has no module {module!r} with parameters"


def describe_other_norms(model: nn.Module, trained: Collection[str], scope: str | Iterable[str] | None) -> str | None:
    """Describe the norms that norm tuning leaves out.

    These are group and batch norms, and norms whose scale comes from a layer inside them.

    Args:
        model: The model.
        trained: Names of the parameters that train.
        scope: The sub-models to tune; all by default.

    Returns:
        A sentence. None if no norm trains, or if the sub-models in which norms train have no such norms.
    """
    norms = set(norm_parameters(model)).intersection(trained)
    inside = parameters_in(model, scope)
    for part in sub_models(model).values():
        if norms.isdisjoint(part):
            inside = inside - set(part)
    left_out = [
        f"{name} ({type(module).__name__})"
        for name, module in find_other_norms(model)
        if (own := {f"{name}.{inner}" for inner, _ in module.named_parameters()}) <= inside and own.isdisjoint(trained)
    ]
    if not norms or not left_out:
        return None
    count = "1 norm does" if len(left_out) == 1 else f"{len(left_out)} norms do"
    return (
        f"{count} not train, for example {left_out[0]}: norm tuning leaves out group and batch norms, "
        "and norms whose scale comes from a layer inside them; to train them, list their modules in `also`"
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of parameters that train and of all parameters, counting shared ones once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def describe_parameters(model: nn.Module) -> str:
    """Describe how many parameters train: in total with the percentage, per sub-model, and elsewhere."""
    trained, total = count_parameters(model)
    parameters = dict(model.named_parameters())
    elsewhere = set(parameters)
    counts = []
    for part, names in sub_models(model).items():
        counts.append((part, [parameters[name] for name in names]))
        elsewhere -= set(names)
    if counts and elsewhere:
        counts.append(("elsewhere", [parameters[name] for name in elsewhere]))
    parts = [
        f"{part} {sum(p.numel() for p in own if p.requires_grad):,} of {sum(p.numel() for p in own):,}"
        for part, own in counts
    ]
    detail = f": {', '.join(parts)}" if parts else ""
    return f"{trained:,} of {total:,} parameters train ({100 * trained / max(total, 1):.4g}%){detail}"


LORA_RANK = 8
# The families' names for query and value projections, and for fused query-key-value projections.
LORA_TARGETS = re.compile(r"(^|\.)(query|value|q_proj|v_proj|q_lin|v_lin|q|v|qkv|c_attn|query_key_value)$")
IA3_TARGETS = re.compile(r"(^|\.)(key|value|k_proj|v_proj|k_lin|v_lin|k|v|qkv|c_attn|query_key_value)$")

"""Find a model's heads: the layers that turn hidden states into logits, and what no checkpoint gave its values.

transformers marks each parameter that it reads from a checkpoint. What carries no mark beside others that do is random:
a new task head, a head whose size changed, a layer that the caller put in. A copy made by `copy.deepcopy` has no marks;
its names are then compared with those in the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import distributed, nn
from transformers.distributed.fsdp import is_fsdp_enabled

from fastln.families.checkpoint import lacking, stored_shape
from fastln.families.parts import (
    embedding_parameters,
    head_parameters,
    input_embeddings,
    outermost_attention,
    output_embeddings,
    pretrained_models,
)

_MARK = "_is_hf_initialized"  # transformers sets it on what it reads, so that it does not initialise it again


def find_heads(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the language-model heads of `model` by name.

    A head is the result of `get_output_embeddings` of the model, or of a model inside it, if it is a plain
    `torch.nn.Linear`. Other heads (quantised, adapted or sharded ones) are not returned.

    Args:
        model: A `PreTrainedModel`, or a module that contains some.
    """
    heads = {id(head) for _, part in pretrained_models(model) if (head := output_embeddings(part)) is not None}
    return {name: module for name, module in model.named_modules() if id(module) in heads and type(module) is nn.Linear}


@dataclass(frozen=True)
class RandomParts:
    """What of a model no checkpoint gave its values, while others got theirs from one.

    Attributes:
        heads: Names of modules behind or between the pretrained models: task heads, poolers and projectors.
        others: Names of other modules and parameters with random values, such as a tower or an embedding.
    """

    heads: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def random_parts(model: nn.Module) -> RandomParts:
    """Return what is random in a model that came from a checkpoint. Parameters that start constant do not count.

    A model made from a configuration alone has no checkpoint, so nothing in it counts.
    """
    parts = _random_parts(model)
    if is_fsdp_enabled() and distributed.is_initialized():
        # With `cpu_ram_efficient_loading`, only the first process has read the checkpoint; the others mark everything.
        shared = [parts]
        distributed.broadcast_object_list(shared, src=0)
        (parts,) = shared
    return parts


def _random_parts(model: nn.Module) -> RandomParts:
    floating = {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    random = {name for name, parameter in floating.items() if not getattr(parameter, _MARK, False)}
    is_marked = len(random) < len(floating)
    if not is_marked:
        random = _lacking(model)
    # What is offloaded lost its mark.
    random = {name for name in random & floating.keys() if not floating[name].is_meta}
    if random:
        random -= _resized(model, is_marked) | _expected(model)
    if not random:
        return RandomParts()
    behind = _behind(model)
    heads, others = [], []
    for name, inside in _whole(model, random):
        # `also` takes modules alone, so a parameter by itself is no head.
        if name not in floating and inside <= behind and not outermost_attention(_within(model, name)):
            heads.append(name)
        elif not all(_is_constant(floating[own]) for own in inside):
            others.append(name)
    # transformers may rename what it reads, so a name that a checkpoint lacks proves little outside the heads.
    return RandomParts(tuple(heads), tuple(others) if is_marked else ())


def _lacking(model: nn.Module) -> set[str]:
    """Return the names of what the checkpoints of a copied model lack, and of what is outside the models they are of.

    Nothing if no part of it has the values of a checkpoint.
    """
    found: set[str] = set()
    loaded: list[str] = []
    models = dict(pretrained_models(model))
    for prefix, part in models.items():
        if not any(_is_inside(prefix, outer) for outer in loaded) and (names := lacking(part)) is not None:
            loaded.append(prefix)
            found |= {f"{prefix}.{name}" if prefix else name for name in names}
    if not loaded:
        return found
    joining = _joining(models)
    outside = {
        name
        for name, _ in model.named_parameters()
        if not any(_is_inside(name, part) for part in models if part in loaded or part not in joining)
    }
    return found | outside


def _joining(models: Collection[str]) -> set[str]:
    """Return those of the models, by name, that hold other models."""
    return {name for name in models if any(other != name and _is_inside(other, name) for other in models)}


def _within(model: nn.Module, name: str) -> nn.Module:
    """Return a module that holds the named one, so that a search by name sees that too."""
    holder = nn.Module()
    holder.add_module("it", model.get_submodule(name))
    return holder


def _whole(model: nn.Module, random: set[str]) -> Iterator[tuple[str, set[str]]]:
    """Yield the outermost modules that are random throughout, and other random parameters; each with its parameters."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def walk(prefix: str, module: nn.Module) -> Iterator[tuple[str, set[str]]]:
        inside = {names[id(parameter)] for parameter in module.parameters()}
        if not inside & random:
            return
        # A weight that another module holds too, such as tied embeddings, has the name that it has there.
        own = {name for name in inside if name.startswith(f"{prefix}.")}
        if prefix and own and inside <= random:
            yield prefix, own
            return
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if name in random and names[id(parameter)] == name:
                yield name, {name}
        for name, child in module.named_children():
            yield from walk(f"{prefix}.{name}" if prefix else name, child)

    yield from walk("", model)


def _behind(model: nn.Module) -> set[str]:
    """Return the names of the parameters behind or between pretrained models, and of poolers that feed those.

    They are outside every transformers model, or in one that holds other such models, as a task's model holds its base.
    """
    names = [name for name, _ in pretrained_models(model)]
    joining = _joining(names)
    found = set(head_parameters(model))
    for name, _ in model.named_parameters():
        owner = max((one for one in names if _is_inside(name, one)), key=len, default=None)
        if owner is None or owner in joining or (owner and "pooler" in name[len(owner) :].split(".")):
            found.add(name)
    return found - set(embedding_parameters(model))


def _is_inside(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _expected(model: nn.Module) -> set[str]:
    """Return the names of parameters that no checkpoint of their class has, such as computed positions."""
    found = set()
    for prefix, part in pretrained_models(model):
        if patterns := list(part._keys_to_ignore_on_load_missing or ()):
            ignored = re.compile("|".join(f"({pattern})" for pattern in patterns))
            names = (name for name, _ in part.named_parameters() if ignored.search(name))
            found |= {f"{prefix}.{name}" if prefix else name for name in names}
    return found


def _resized(model: nn.Module, is_marked: bool) -> set[str]:
    """Return the names of output embeddings with a new number of rows: transformers copies the old ones, unmarked."""
    found = set()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for _, part in pretrained_models(model):
        head, embeddings = output_embeddings(part), input_embeddings(part)
        name = names.get(id(getattr(head, "weight", None)))
        if name is None or head is None or embeddings is None:
            continue
        if is_marked and not getattr(embeddings.weight, _MARK, False):
            continue  # resized embeddings keep their mark; these are random too, as their size was another
        now = tuple(model.get_parameter(name).shape)
        try:
            before = stored_shape(part, name)
            is_resized = before is not None and before != now and before[1:] == now[1:]
        except LookupError:
            is_resized = True  # or it is random, which nothing here tells; then it stays as it is
        if is_resized:
            found |= {names[id(parameter)] for parameter in head.parameters() if id(parameter) in names}
    return found


def _is_constant(parameter: nn.Parameter) -> bool:
    """Whether all values are one, as those of a new norm, bias or scale; that is a start, and not random."""
    if parameter.is_meta or not parameter.numel():
        return True
    return bool(parameter.min() == parameter.max())

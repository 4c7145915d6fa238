"""Fingerprints of base models: an adapter or checkpoint stores one, to check whether a model is its base."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor, nn

from fastln.errors import FastLNError
from fastln.originals import originals, sampled
from fastln.processes import gathered

FINGERPRINT = "fastln_base"
"""The key of the fingerprint in a safetensors file's metadata."""

_VERSION = "v2"
_N_SHORT = 6  # hexadecimal digits of a parameter's own digest
_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def fingerprint(model: nn.Module, without: Collection[str] = ()) -> str:
    """Return a fingerprint of a base model: digests of its parameters' names, shapes and some of their values.

    It has a digest of the values rounded to bfloat16, one of the values rounded to float16, the dtypes of the
    parameters, a short digest of each parameter, and the size of the vocabulary. `difference` compares a model with it.
    It covers about 64 values of each parameter. So bases that were trained differently have different fingerprints, but
    bases that differ in only a few values may not. It also covers the list of answers that a dual encoder chooses from:
    with another list, the same head gives other answers.

    Args:
        model: the model, prepared or stock.
        without: names of parameters that are left out.
    """
    here = _Digests(model, without)
    fields = [*(f"{name}={digest}" for name, digest in here.all.items()), f"of={','.join(here.dtypes)}"]
    fields += [f"each={','.join(here.each.values())}", f"names={here.names}", f"vocabulary={vocabulary(model)}"]
    return " ".join([_VERSION, *fields])


def vocabulary(model: nn.Module) -> int:
    """Return the number of rows of the model's word embeddings; 0 if it has none."""
    words = _words(model)
    return 0 if words is None else len(words)


def vocabulary_differs(stored: str | None, model: nn.Module) -> str | None:
    """Return what to do if the model's vocabulary has not the size that a fingerprint has; None if it has."""
    there = int(_fields(stored or "").get("vocabulary", 0))
    if not there or there == (here := vocabulary(model)):
        return None
    return (
        f"its vocabulary has {there} tokens there and {here} here; call model.resize_token_embeddings({there}) first, "
        "and load the rows that were added from where they were saved, because they start random"
    )


def difference(stored: str, model: nn.Module, without: Collection[str] = ()) -> str | None:
    """Compare a model with a stored fingerprint.

    The model may have another dtype than the one with the fingerprint: a float32 checkpoint matches itself loaded in
    bfloat16 or float16. But if one is loaded in bfloat16 and the other in float16, they may not match, because each
    dtype keeps bits that the other rounds away. The answer then says so.

    Args:
        stored: what `fingerprint` returned, or the older form without a version, a bare digest in bfloat16.
        model: the model, prepared or stock.
        without: names of parameters that are left out.

    Returns:
        What differs, for an error message; None if the model matches.

    Raises:
        FastLNError: if a later version of fastln wrote the fingerprint.
    """
    version, *fields = stored.split()
    if not fields:
        there, dtypes_there = {"bfloat16": version}, ["bfloat16"]
    elif version == _VERSION:
        there = _fields(stored)
        dtypes_there = there["of"].split(",")
    else:
        raise FastLNError(f"the fingerprint of the base is of version {version}; this fastln reads up to {_VERSION}")
    here = _Digests(model, without)
    if any(there.get(name) == digest for name, digest in here.all.items()):
        return None
    differs = _which(there, here, model)
    if (resized := vocabulary_differs(stored, model)) is not None:
        return resized if differs is None else f"{resized}; besides, {differs}"
    differs = (
        differs
        or "the frozen weights, or the answers that the model chooses from, differ from those it was saved beside"
    )
    if {"bfloat16", "float16"} <= {*here.dtypes, *dtypes_there} and here.dtypes != dtypes_there:
        differs += (
            f" (the fingerprint is of {' and '.join(dtypes_there)}, the weights are {' and '.join(here.dtypes)}: one "
            "checkpoint rounds to different values in these; load the base in float32, or as it was in training)"
        )
    elif not fields:
        differs += (
            " (the fingerprint is of the older form, which does not know the dtype of its base: load the base in the "
            "dtype that it had in training)"
        )
    return differs


def check_has_values(name: str, tensor: torch.Tensor) -> None:
    """Raise a `FastLNError` if a model's tensor is on the meta device, because it is offloaded or was never loaded."""
    if tensor.is_meta:
        raise FastLNError(
            f"{name} has no values: it is offloaded to the CPU or a disk, or was never loaded; load the whole model "
            "onto a device (no device_map with offload)"
        )


class _Digests:
    """The digests of a model's parameters.

    Attributes:
        all: of all parameters and the answers, in each precision.
        each: of each parameter, by name: a short one in each precision, joined.
        names: of the parameters' names.
        dtypes: the names of the parameters' dtypes.
    """

    def __init__(self, model: nn.Module, without: Collection[str]) -> None:
        digests = {name: hashlib.sha256() for name in _PRECISIONS}
        names, dtypes = hashlib.sha256(), set()
        replaced = originals(model)
        self.each: dict[str, str] = {}
        for name, parameter in sorted(model.named_parameters()):
            if name not in without:
                check_has_values(name, parameter)
                original = replaced.get(name)
                values = sampled(gathered(parameter).reshape(-1)) if original is None else original.samples
                dtypes.add(str(parameter.dtype if original is None else original.dtype).removeprefix("torch."))
                values = values.cpu()
                names.update(name.encode())
                own = []
                for precision, digest in digests.items():
                    rounded = values.to(_PRECISIONS[precision]).contiguous().view(torch.uint8).numpy().tobytes()
                    content = repr((name, tuple(parameter.shape))).encode() + rounded
                    digest.update(content)
                    own.append(hashlib.sha256(content).hexdigest()[:_N_SHORT])
                self.each[name] = "".join(own)
        if answers := getattr(getattr(model, "config", None), "answers", None):
            for digest in digests.values():
                digest.update(repr(list(answers)).encode())
        self.all = {name: digest.hexdigest() for name, digest in digests.items()}
        self.names = names.hexdigest()[:_N_SHORT]
        self.dtypes = sorted(dtypes)


def _which(there: dict[str, str], here: _Digests, model: nn.Module) -> str | None:
    """Return which parameters differ from those of a fingerprint, apart from resized word embeddings.

    None if only those do, or if that cannot be told.
    """
    each = there.get("each", "").split(",")
    if there.get("names") != here.names or len(each) != len(here.each):
        return None
    words = _words(model) if int(there["vocabulary"]) != vocabulary(model) else None
    n_rows = None if words is None else len(words)
    differ = [
        name
        for (name, own), other in zip(here.each.items(), each, strict=True)
        # Rounded from another dtype, one of its two digests still fits.
        if own[:_N_SHORT] != other[:_N_SHORT] and own[_N_SHORT:] != other[_N_SHORT:]
        if n_rows is None or model.get_parameter(name).shape[:1] != (n_rows,)
    ]
    if not differ:
        return None if words is not None else "the answers that the model chooses from differ"
    return (
        f"{len(differ)} of {len(each)} frozen parameters differ from those it was saved beside, for example {differ[0]}"
    )


def _fields(stored: str) -> dict[str, str]:
    return dict(field.split("=", 1) for field in stored.split()[1:])


def _words(model: nn.Module) -> Tensor | None:
    """Return the weight of the model's word embeddings."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        words = get() if get is not None else None
    except (NotImplementedError, AttributeError):  # models without words
        return None
    weight = getattr(words, "weight", None)
    return weight if isinstance(words, nn.Embedding) and isinstance(weight, Tensor) else None

"""Fingerprints of base models: an adapter or checkpoint stores one, to check whether a model is its base."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
from torch import nn

from fastln.errors import FastLNError
from fastln.processes import gathered

FINGERPRINT = "fastln_base"
"""The key of the fingerprint in a safetensors file's metadata."""

_VERSION = "v2"
_N_SAMPLED = 64  # values per parameter
_PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def fingerprint(model: nn.Module, without: Collection[str] = ()) -> str:
    """Return a fingerprint of a base model: digests of its parameters' names, shapes and some of their values.

    It has a digest of the values rounded to bfloat16, one of the values rounded to float16, and the dtypes of the
    parameters. `difference` compares a model with it. It covers about 64 values of each parameter. So bases that were
    trained differently have different fingerprints, but bases that differ in only a few values may not. It also covers
    the list of answers that a dual encoder chooses from: with another list, the same head gives other answers.

    Args:
        model: the model, prepared or stock.
        without: names of parameters that are left out.
    """
    digests, dtypes = _digests(model, without)
    return " ".join([_VERSION, *(f"{name}={digest}" for name, digest in digests.items()), f"of={','.join(dtypes)}"])


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
        there = dict(field.split("=", 1) for field in fields)
        dtypes_there = there.pop("of").split(",")
    else:
        raise FastLNError(f"the fingerprint of the base is of version {version}; this fastln reads up to {_VERSION}")
    here, dtypes = _digests(model, without)
    if any(there.get(name) == digest for name, digest in here.items()):
        return None
    differs = "the frozen weights, or the answers that the model chooses from, differ from those it was saved beside"
    if {"bfloat16", "float16"} <= {*dtypes, *dtypes_there} and dtypes != dtypes_there:
        differs += (
            f" (the fingerprint is of {' and '.join(dtypes_there)}, the weights are {' and '.join(dtypes)}: one "
            "checkpoint rounds to different values in these; load the base in float32, or as it was in training)"
        )
    return differs


def check_has_values(name: str, tensor: torch.Tensor) -> None:
    """Raise a `FastLNError` if a model's tensor is on the meta device, because it is offloaded or was never loaded."""
    if tensor.is_meta:
        raise FastLNError(
            f"{name} has no values: it is offloaded to the CPU or a disk, or was never loaded; load the whole model "
            "onto a device (no device_map with offload)"
        )


def _digests(model: nn.Module, without: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Return the digest of the model in each precision, and the names of its parameters' dtypes."""
    digests = {name: hashlib.sha256() for name in _PRECISIONS}
    dtypes = set()
    for name, parameter in sorted(model.named_parameters()):
        if name not in without:
            check_has_values(name, parameter)
            dtypes.add(str(parameter.dtype).removeprefix("torch."))
            values = gathered(parameter).reshape(-1)
            values = values[:: max(1, len(values) // _N_SAMPLED)].cpu()
            for precision, digest in digests.items():
                rounded = values.to(_PRECISIONS[precision]).contiguous()
                digest.update(repr((name, tuple(parameter.shape))).encode())
                digest.update(rounded.view(torch.uint8).numpy().tobytes())
    if answers := getattr(getattr(model, "config", None), "answers", None):
        for digest in digests.values():
            digest.update(repr(list(answers)).encode())
    return {name: digest.hexdigest() for name, digest in digests.items()}, sorted(dtypes)

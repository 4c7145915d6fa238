"""Which frozen linear layers run in 8 bits, and how their weights are rounded: rules that need no data."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastln.decision import Change, Stay
from fastln.families.norms import is_norm, norm_kind
from fastln.families.parts import outermost_attention
from fastln.families.readers import readers_of
from fastln.ops import OpSettings
from fastln.ops.attention import SWITCH, why_exact
from fastln.ops.backends import resolve
from fastln.standins.int8 import Int8Spec
from fastln_kernels.cpu import units
from fastln_kernels.reference_int8 import TURNED

INT8_STAND_INS = {"linear": "int8_linear", "conv1d": "int8_conv1d"}
"""The stand-ins of linear layers in 8 bits, by what the layers are."""

SMALLEST = 128
"""A layer with fewer inputs or outputs gains nothing: rounding its rows takes as long as the products save."""

HEAD_GAIN = 2.5
"""A language-model head gains if 8-bit units are so many times as fast: its gradient is rounded twice."""

TWICE = re.compile(
    r"(^|\.)(q|k|v|kv|qkv|query|key|value|query_key_value|c_attn|Wqkv)(_[ab])?(_proj|_lin)?(_with_mqa)?$"
)
"""The families' names for layers that make queries, keys and values. In language models with outliers the weights of
these get a second term: scores of attention are large there, so errors of queries and keys weigh more than others."""

GAIN = 2.5
"""With 8-bit units less than so many times as fast as float ones, rounding rows may cost more than products save."""

MOST = 2**16
"""Sums of more products could exceed 32 bits."""


class Int8Rules:
    """Decides for each frozen linear layer of a model.

    Args:
        model: The model.
        settings: How operations run.
        device: The device that the model will run on.
        keep_weights: Whether the original weights are kept.
    """

    def __init__(self, model: nn.Module, settings: OpSettings, device: torch.device, keep_weights: bool) -> None:
        self._model, self._settings, self._device = model, settings, device
        self._modules = dict(model.named_modules())
        self._keep = keep_weights
        self._attention = tuple(f"{name}." for name in outermost_attention(model))
        self._holders = Counter(
            id(parameter) for module in model.modules() for parameter in module._parameters.values()
        )
        choice = resolve("int8_linear", device, settings)
        fits = choice.backend != "reference" or settings.backend == "reference"
        # What serves in 8 bits' stead is not "plain PyTorch" but the exact layer.
        self._obstacle = None if fits else choice.lacks or f"no kernels multiply in 8 bits on device {device.type!r}"
        if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 10:
            self._obstacle = "GPUs of compute capability 10 multiply 8-bit whole numbers no faster than bfloat16"

    def of(self, name: str, *, is_head: bool = False) -> Int8Spec | str:
        """Return how a linear layer's weight is rounded, or why it stays exact.

        Args:
            name: The name of an `nn.Linear` or `Conv1D` whose weight is frozen.
            is_head: Whether it is a language-model head, whose weight stays beside its 8-bit form.
        """
        if self._obstacle is not None:
            return self._obstacle
        module = self._modules[name]
        weight = module.weight
        if type(weight) is not nn.Parameter:
            return "its weight is not a plain parameter"
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"its weight is {str(weight.dtype).removeprefix('torch.')}, which is not rounded to 8 bits"
        if min(weight.shape) < SMALLEST:
            return f"too small to gain (under {SMALLEST} inputs or outputs)"
        if max(weight.shape) > MOST:
            return f"sums over more than {MOST:,} products may not fit into 32 bits"
        if is_head:
            on_cpu = self._device.type == "cpu"
            reason = _why_no_head(weight.dtype) if on_cpu else "heads run in 8 bits on CPUs only"
            return Int8Spec(self._turned(name), name=name) if reason is None else reason
        if self._holders[id(weight)] > 1:
            return "another module shares its weight"
        if readers_of(self._model, name, ("weight",)):
            return "code outside it reads its weight"
        return Int8Spec(self._turned(name), self._keep, self._twice(name), name)

    def products(self, stand_in: str, name: str, detail: Any) -> tuple[str, str | None]:
        """Return in which form the products of a change run, and why they are exact if they are.

        Args:
            stand_in: What replaces the module: a key of `fastln.standins.table.STAND_INS`.
            name: The module's name.
            detail: The change's detail.
        """
        if isinstance(detail, Int8Spec):
            return "int8" + ", twice" * detail.twice + ", turned" * detail.turned, None
        if stand_in == "lm_head":
            spec = self.of(name, is_head=True)
            return "exact", spec if isinstance(spec, str) else "it trains"
        if stand_in == "patches":
            return "exact", "pixels need no gradient, so that it is a small part of a step"
        if "attention" not in stand_in:
            return "exact", None
        floats = (p.dtype for p in self._modules[name].parameters() if p.is_floating_point())
        reason = why_exact(self._settings, self._device, next(floats, torch.float32)) or self._why_exact_scores(name)
        return ("exact", reason) if reason else ("int8 where it pays", None)

    def _turned(self, name: str) -> bool:
        """Whether a layer is turned: where its rows may hold numbers much larger than the others.

        Rows of norms do, in encoders too. Hidden rows of MLPs, which the layer that narrows them reads, do where norms
        are RMSNorms, which do not centre, and in causal language models (LLM.int8(), arXiv 2208.07339).
        `scripts/gradient_cosines.py` measures what it brings.
        """
        n_inner, n_cols = _sizes(self._modules[name])
        return n_inner % TURNED == 0 and (n_inner <= n_cols or self._has_large_outliers(name))

    def _twice(self, name: str) -> bool:
        """Whether a layer's weight has a second term: where rows hold large numbers, and its errors count most.

        Those are queries, keys and values, and the last layers that narrow an MLP's hidden rows: they take the large
        numbers out of the residual stream again (Massive Activations, arXiv 2402.17762).
        """
        makes_scores = name.startswith(self._attention) and bool(TWICE.search(name))
        return (makes_scores or self._ends_outliers(name)) and self._has_large_outliers(name)

    def _ends_outliers(self, name: str) -> bool:
        """Whether a layer has more inputs than outputs, in the last tenth of a model's blocks."""
        n_inner, n_cols = _sizes(self._modules[name])
        parts = name.split(".")
        at = next((n for n in range(len(parts) - 1, 0, -1) if parts[n].isdigit()), None)
        blocks = None if at is None else self._modules[".".join(parts[:at])]
        if n_inner <= n_cols or at is None or not isinstance(blocks, nn.ModuleList):
            return False
        return int(parts[at]) >= len(blocks) - math.ceil(len(blocks) / 10)

    def _why_exact_scores(self, name: str) -> str | None:
        """Say why an attention's products are exact where units would gain; None if they run in 8 bits."""
        if os.environ.get(SWITCH) == "1" or not self._has_large_outliers(name):
            return None
        return "where norms are RMSNorms or attention is causal, rounded scores cost too much accuracy"

    def _has_large_outliers(self, name: str) -> bool:
        """Whether the norms around a layer are RMSNorms, or in a causal language model."""
        parts = name.split(".")
        for n in range(len(parts) - 1, -1, -1):
            around = self._modules[".".join(parts[:n])]
            kinds = [kind for module in around.modules() if is_norm(module) for kind in [norm_kind(module)]]
            if kinds:
                causal = any(getattr(module, "is_causal", False) is True for module in around.modules())
                return causal or any(kind is not None and not kind.centre for kind in kinds)
        return False


def _why_no_head(dtype: torch.dtype) -> str | None:
    """Say why a head gains nothing from 8 bits, which need three products where exact ones are two."""
    rates = units.rates()
    name = str(units.compute_dtype(dtype)).removeprefix("torch.")
    if not {"int8", name} <= rates.keys():  # as where Triton's interpreter stands for a GPU
        return "this processor has no units for products in 8 bits"
    if rates["int8"] >= HEAD_GAIN * rates[name]:
        return None
    return f"three products in 8 bits replace two, and units in 8 bits are not {HEAD_GAIN} times as fast as {name} here"


def describe_gain() -> str | None:
    """Say whether products in 8 bits pay on this CPU, by the rates of its units; None if it has none in 8 bits."""
    rates = units.rates()
    bfloat16 = str(units.compute_dtype(torch.bfloat16, quietly=True)).removeprefix("torch.")
    serving = {"float32": "float32", "bfloat16": bfloat16}  # by the rows' dtype
    if not {"int8", *serving.values()} <= rates.keys():
        return None
    gains = {rows: rates["int8"] / rates[unit] for rows, unit in serving.items()}
    pays = {rows: gain >= GAIN for rows, gain in gains.items()}
    if pays["float32"] != pays["bfloat16"]:
        does, does_not = sorted(pays, key=lambda rows: not pays[rows])
        return (
            f"pays here for rows in {does}: 8-bit units are {gains[does]:.1f} times as fast as theirs; it may not for "
            f"{does_not} ({gains[does_not]:.1f} times)"
        )
    told = {f"{serving[rows]}'s": gain for rows, gain in gains.items()}
    fast = " and ".join(f"{gain:.1f} times as fast as {name}" for name, gain in told.items())
    if pays["float32"]:
        return f"pays here: 8-bit units are {fast}"
    return f"may not pay here, but for a byte a weight: 8-bit units are only {fast}, not {GAIN} times"


def _describe_slow_units(model: nn.Module) -> str | None:
    rates = units.rates()
    dtype = next((p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float32)), torch.float32)
    name = str(units.compute_dtype(dtype)).removeprefix("torch.")
    if not {"int8", name} <= rates.keys() or rates["int8"] >= GAIN * rates[name]:
        return None
    return (
        f"products='int8' may make steps slower here: 8-bit units reach {rates['int8'] / 1e9:.0f} GFLOP/s a thread, "
        f"{name} ones {rates[name] / 1e9:.0f}, and rounding rows takes time; weights take a byte each"
    )


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Return how many inputs and outputs a linear layer has."""
    n_cols, n_inner = module.get_parameter("weight").shape
    return (n_cols, n_inner) if isinstance(module, Conv1D) else (n_inner, n_cols)


_NOT = "not in 8 bits: "


def describe_int8(
    decided: Iterable[Change | Stay],
    settings: OpSettings,
    keep_weights: bool,
    model: nn.Module,
    device: torch.device,
) -> str | None:
    """Describe a setting of 8-bit products that reaches no layer, or may make steps slower; None if there is none."""
    if settings.products != "int8":
        return "keep_weights has no effect with exact products, which replace no weight" if keep_weights else None
    decided = list(decided)
    if any(isinstance(entry, Change) and entry.stand_in in INT8_STAND_INS.values() for entry in decided):
        return _describe_slow_units(model) if device.type == "cpu" else None
    reasons = Counter(
        entry.why_exact if isinstance(entry, Change) else entry.reason.partition(";")[0].removeprefix(_NOT)
        for entry in decided
        if (isinstance(entry, Change) and entry.stand_in in INT8_STAND_INS and entry.why_exact)
        or entry.reason.startswith(_NOT)
    )
    stays = dict.fromkeys(entry.reason for entry in decided if entry.kind == "linear layer")
    why = "; ".join(filter(None, reasons)) or "; ".join(stays) or "it has no linear layers"
    others = dict.fromkeys(
        entry.kind for entry in decided if isinstance(entry, Change) and "int8" in (entry.products or "")
    )
    if others:  # attention multiplies in 8 bits whether weights train or not
        return f"products='int8' reaches no linear layer of this model here, only {' and '.join(others)}: {why}"
    return f"products='int8' has no effect on this model here, so its products are exact: {why}"

"""Which backend computes an operation, and why: the table that `fastln doctor` prints."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastln.errors import FastLNError
from fastln.ops.settings import BACKENDS, OpSettings
from fastln_kernels.cpu import library, products, units

__all__ = ["BACKENDS", "OPERATIONS", "Choice", "implementation", "resolve"]


class _Kernels(NamedTuple):
    """A backend's implementation of an operation.

    Attributes:
        module: The module of its functions, inside `fastln_kernels`.
        words: A description for users.
        library: The compiled library (`fastln_kernels.cpu.library`) that it needs, if any.
        without: The fallback if that library is missing. None: the next backend.
        unasked: What is said of the reference where it is chosen for want of a better backend.
    """

    module: str
    words: str
    library: str | None = None
    without: tuple[str, str] | None = None
    unasked: str | None = None


_TRITON, _CPU, _PLAIN = "fastln's Triton kernels", "fastln's compiled CPU kernels", "plain PyTorch"


def _norm(without: tuple[str, str] | None = None) -> dict[str, _Kernels]:
    return {
        "triton": _Kernels("norm", _TRITON),
        "cpu": _Kernels("cpu.native_norm", _CPU, "norm", without),
        "reference": _Kernels("reference", _PLAIN),
    }


def _activation(without: tuple[str, str] | None = None) -> dict[str, _Kernels]:
    return {
        "triton": _Kernels("activation", _TRITON),
        "cpu": _Kernels("cpu.native_activation", _CPU, "activation", without),
        "reference": _Kernels("reference_activation", _PLAIN),
    }


# The implementations of each operation, fastest first.
_TABLE: dict[str, dict[str, _Kernels]] = {
    "layer_norm": _norm(("cpu.torch_norm", "torch's fused CPU kernel")),
    "rms_norm": _norm(),
    "dropout_add_norm": _norm(),
    "activation": _activation(
        ("cpu.torch_activation", "torch's fused CPU kernels (plain PyTorch for quick_gelu)"),
    ),
    "gated_activation": _activation(),
    "dropout": {
        "triton": _Kernels("dropout", _TRITON),
        "cpu": _Kernels("cpu.native_dropout", _CPU, "dropout"),
        "reference": _Kernels("reference", _PLAIN),
    },
    "attention": {
        "cpu": _Kernels(
            "cpu.native_attention",
            "fastln's compiled CPU kernels, in blocks",
            "attention",
            (
                "reference_attention",
                "torch's scaled_dot_product_attention (plain PyTorch, in blocks, for dropout in training)",
            ),
        ),
        "reference": _Kernels("reference_attention", "torch's scaled_dot_product_attention"),
    },
    "rotary": {
        "cpu": _Kernels("cpu.native_rotary", _CPU, "rotary"),
        "reference": _Kernels("reference_rotary", _PLAIN),
    },
    "int8_linear": {
        "triton": _Kernels("int8", _TRITON),
        "cpu": _Kernels("cpu.native_int8", "fastln's compiled CPU kernels, 8-bit products with 32-bit sums", "int8"),
        "reference": _Kernels(
            "reference_int8", "plain PyTorch, slowly", unasked="so prepare() keeps products exact in its place"
        ),
    },
    "linear": {
        "cpu": _Kernels(
            "cpu.native_linear", "fastln's compiled CPU kernels, which lay weights out block by block", "linear"
        ),
        "reference": _Kernels("reference", "torch's linear"),
    },
}

OPERATIONS = tuple(_TABLE)
"""The operations for which a backend is chosen."""

_DEVICES = {"triton": ("cuda",), "cpu": ("cpu",)}  # where `auto` chooses them; the reference runs everywhere


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that computes an operation.

    Attributes:
        backend: A name from `BACKENDS`, never `auto`.
        reason: Why this one, in words for users.
        module: The module whose functions compute, inside `fastln_kernels`.
        lacks: Why better backends were passed over, as it stands in the reason; None if none was.
    """

    backend: str
    reason: str
    module: str
    lacks: str | None = None


@functools.cache
def resolve(op: str, device: torch.device, settings: OpSettings) -> Choice:
    """Choose the backend of an operation.

    If the operation lacks the backend that the settings name, `auto` decides. So one name works for a whole model.
    `triton` runs on CPU tensors only under Triton's interpreter, for tests.

    Args:
        op: A name from `OPERATIONS`.
        device: The device of the operation's tensors.
        settings: The settings that name the backend.

    Raises:
        FastLNError: If the backend that the settings name cannot run on this device, or FASTLN_CPU_UNIT is no choice.
    """
    asked, available, passed_over = settings.backend, dict(_TABLE[op]), []
    may_be_cpu = device.type == "cpu" and (asked == "cpu" or asked not in available)
    reason = _no_library(available["cpu"]) if may_be_cpu else None  # the first use compiles the library
    if reason is not None:
        without = available["cpu"].without
        if without is None:
            del available["cpu"]
            passed_over.append(reason if reason == products.NO_INT8 else f"no compiled CPU kernels: {reason}")
        else:
            module, words = without
            available["cpu"] = _Kernels(
                module, f"{words}, because fastln's compiled kernels cannot run here ({reason})"
            )
    if asked in available:
        obstacle = _obstacle(asked, device)
        if obstacle:
            raise FastLNError(f"backend {asked!r} cannot run {op} on device {device.type!r}: {obstacle}")
        return Choice(asked, f"{available[asked].words}, as asked for", available[asked].module)
    if asked != "auto" and asked not in _TABLE[op]:
        passed_over.append(f"{op} has no {asked} backend")
    for backend, kernels in available.items():
        if device.type not in _DEVICES.get(backend, (device.type,)):
            continue
        obstacle = _obstacle(backend, device)
        if obstacle is None:
            words = f"{kernels.words}, {_praise(backend, kernels, device, passed_over)}"
            return Choice(backend, "; ".join((words, *passed_over)), kernels.module, "; ".join(passed_over) or None)
        passed_over.append(f"not {backend}: {obstacle}")
    raise AssertionError(f"{op} has no backend that runs everywhere")


def _praise(backend: str, kernels: _Kernels, device: torch.device, passed_over: list[str]) -> str:
    """Say why kernels are chosen that nobody asked for: not as the fastest where they are all that is left."""
    if kernels.unasked is not None:
        return kernels.unasked
    is_left = backend == "reference" and passed_over
    return "all that runs here" if is_left else f"the fastest for device {device.type!r}"


def implementation(op: str, x: Tensor, settings: OpSettings) -> ModuleType:
    """Return the module whose functions compute an operation of `x`.

    Triton's and the CPU's kernels compute in float32, so float64 tensors go to the reference.

    Args:
        op: A name from `OPERATIONS`.
        x: The tensor whose device and dtype decide.
        settings: The settings that name the backend.

    Raises:
        FastLNError: If the backend that the settings name cannot run on the device of `x`, or it is Triton and `x` is
            float64.
    """
    choice = resolve(op, x.device, settings)
    if x.dtype == torch.float64 and choice.backend != "reference":
        if choice.backend == settings.backend == "triton":
            raise FastLNError("backend 'triton' computes in float32; use 'auto' or 'reference' for float64 tensors")
        return _module(_TABLE[op]["reference"].module)
    return _module(choice.module)


@functools.cache
def _module(name: str) -> ModuleType:
    # Triton may not be installed, so its kernels are imported only when needed.
    return importlib.import_module(f"fastln_kernels.{name}")


def _no_library(kernels: _Kernels) -> str | None:
    """Say why the compiled library that these kernels need is not available; None if it is."""
    if kernels.library is None:
        return None
    if kernels.library not in products.LIBRARIES:
        return library.why_not(kernels.library)
    try:
        units.forced()
    except ValueError as error:
        raise FastLNError(str(error)) from error
    return products.why_not(kernels.library)


def _obstacle(backend: str, device: torch.device) -> str | None:
    if device.type == "meta":  # it stands for any device that the work is planned for
        return None
    if backend == "cpu" and device.type != "cpu":
        return "it takes CPU tensors only"
    if backend == "triton":
        try:
            knobs = importlib.import_module("triton").knobs
        except ImportError as error:
            return f"triton cannot be imported ({error})"
        if device.type == "cpu" and not knobs.runtime.interpret:
            return "Triton runs on CPU tensors only under its interpreter: set TRITON_INTERPRET=1 before starting"
        if device.type not in ("cpu", "cuda"):
            return "it takes CUDA tensors only"
    return None

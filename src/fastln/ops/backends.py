"""Which backend an operation runs on, and why."""

import functools
import importlib
from dataclasses import dataclass
from difflib import get_close_matches

import torch

from fastln.errors import FastLNError
from fastln_kernels.cpu import library, products

BACKENDS = ("auto", "triton", "cpu", "reference")
"""What may be asked for; `auto` takes the best that the device has."""

_KERNELS = {
    "triton": "fastln's Triton kernels",
    "cpu": "fastln's compiled CPU kernels",
    "reference": "plain PyTorch",
}

# What each operation has, best first: a backend that an operation lacks is passed over.
_IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "layer_norm": _KERNELS,
    "rms_norm": _KERNELS,
    "dropout_add_norm": _KERNELS,
    "activation": _KERNELS,
    "gated_activation": _KERNELS,
    "dropout": _KERNELS,
    "attention": {
        "cpu": "fastln's compiled CPU kernels, in blocks",
        "reference": "torch's scaled_dot_product_attention",
    },
    "linear": {
        "cpu": "fastln's compiled CPU kernels, which lay weights out block by block",
        "reference": "torch's linear",
    },
}

# The library (`fastln_kernels.cpu.library`) that the cpu backend of an operation is made of, and what stands in for it.
_LIBRARIES = {
    "layer_norm": "norm",
    "rms_norm": "norm",
    "dropout_add_norm": "norm",
    "activation": "activation",
    "gated_activation": "activation",
    "dropout": "dropout",
    "attention": "attention",
    "linear": "linear",
}
_MADE_OF_PRODUCTS = ("attention", "linear")
_WITHOUT_LIBRARY = {
    "layer_norm": "torch's fused CPU kernel",
    "activation": "torch's fused CPU kernels (plain PyTorch for quick_gelu)",
    "attention": "torch's scaled_dot_product_attention (in training with dropout plain PyTorch, in blocks)",
}

OPERATIONS = tuple(_IMPLEMENTATIONS)
"""The operations that choose a backend."""

_DEVICES = {"triton": ("cuda",), "cpu": ("cpu",)}  # where `auto` takes a backend; the reference runs everywhere


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that an operation runs on.

    Attributes:
        backend: A name from `BACKENDS`, never `auto`.
        reason: Why this one, in words for a user.
    """

    backend: str
    reason: str


@functools.cache
def resolve(op: str, device: torch.device, requested: str) -> Choice:
    """Choose the backend of an operation.

    A backend that is asked for by name but that the operation does not have is as good as `auto`, so that one name can
    be asked for a whole model. `triton` runs on CPU tensors only under Triton's interpreter, for tests.

    Args:
        op: A name from `OPERATIONS`.
        device: Where the operation's tensors are.
        requested: A name from `BACKENDS`.

    Raises:
        FastLNError: If there is no such backend, or it cannot run on this device.
    """
    if requested not in BACKENDS:
        near = get_close_matches(requested, BACKENDS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise FastLNError(f"unknown backend {requested!r}{hint}; valid backends: {', '.join(BACKENDS)}")
    available, passed_over = dict(_IMPLEMENTATIONS[op]), []
    if device.type == "cpu" and op in _LIBRARIES and requested in ("auto", "cpu"):
        # Compiles it, at the first use on this machine.
        why_not = products.why_not if op in _MADE_OF_PRODUCTS else library.why_not
        reason = why_not(_LIBRARIES[op])
        if reason and op in _WITHOUT_LIBRARY:
            available["cpu"] = f"{_WITHOUT_LIBRARY[op]}, for want of compiled kernels ({reason})"
        elif reason:
            del available["cpu"]
            passed_over.append(f"no compiled CPU kernels: {reason}")
    if requested in available:
        obstacle = _obstacle(requested, device)
        if obstacle:
            raise FastLNError(f"backend {requested!r} cannot run {op} on device {device.type!r}: {obstacle}")
        return Choice(requested, f"{available[requested]}, as asked for")
    if requested != "auto":
        passed_over.append(f"{op} has no {requested} backend")
    for backend, what in available.items():
        if device.type not in _DEVICES.get(backend, (device.type,)):
            continue
        obstacle = _obstacle(backend, device)
        if obstacle is None:
            return Choice(backend, "; ".join((f"{what}, the best for device {device.type!r}", *passed_over)))
        passed_over.append(f"not {backend}: {obstacle}")
    raise AssertionError(f"{op} has no backend that runs everywhere")


def _obstacle(backend: str, device: torch.device) -> str | None:
    if device.type == "meta":  # it stands for whatever device the work is planned for
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

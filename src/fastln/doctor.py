"""What this machine has, and which backend each operation will use and why."""

from __future__ import annotations

import platform
import shlex
from typing import Any

import psutil
import torch

from fastln.machine import cpu_flags, cpu_model, has_bfloat16_units, package_version, settle_device
from fastln.ops.backends import OPERATIONS, resolve
from fastln_kernels.cpu import library

PACKAGES = ("fastln", "torch", "triton", "transformers", "peft", "accelerate", "flash-attn", "liger-kernel")
VECTORS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


WIDER_THAN_128_BITS = {"avx2", "avx512f", "sve"}


def examine() -> dict[str, Any]:
    """Look at the machine.

    Returns:
        `packages` (version or None), `machine`, and `operations`: for each operation the backend that "auto" gives
        on the device that "auto" gives, and why.
    """
    device = settle_device("auto")
    flags = cpu_flags()
    choices = {operation: resolve(operation, device, "auto") for operation in OPERATIONS}
    return {
        "packages": {package: package_version(package) for package in PACKAGES},
        "machine": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpu": cpu_model(),
            "cpu_vectors": [flag for flag in VECTORS if flag in flags],
            "threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "bfloat16_units": has_bfloat16_units(device),
            "freed_memory": None,
            "compiler": shlex.join(library.compiler()) or None,
            "device": str(device),
            "slower": _slower(flags) if device.type == "cpu" else None,
        },
        "operations": {
            operation: {"backend": choice.backend, "reason": choice.reason} for operation, choice in choices.items()
        },
    }


def _slower(flags: set[str]) -> str | None:
    """What this CPU's kernels lack to be fast; None where they lack nothing."""
    lacks = []
    if why := library.why_not("norm"):
        lacks.append(f"every operation runs without compiled kernels ({why})")
    if flags and not flags & WIDER_THAN_128_BITS:
        lacks.append("kernels run on vectors of 128 bits, for want of AVX2, AVX-512 or SVE")
    return "; ".join(lacks) or None


def render(findings: dict[str, Any]) -> str:
    """Write what `examine` found for a person."""
    machine = findings["machine"]
    lines = ["packages"]
    lines += [f"  {name:14} {version or 'not installed'}" for name, version in findings["packages"].items()]
    lines += [
        "machine",
        f"  {'system':14} {machine['system']}, Python {machine['python']}",
        f"  {'cpu':14} {machine['cpu']}, {machine['threads']} threads, {machine['memory_gib']} GiB",
        f"  {'vectors':14} {' '.join(machine['cpu_vectors']) or 'none known'}",
        f"  {'gpu':14} {machine['gpu'] or 'none'}",
        f"  {'bfloat16':14} "
        + ("in hardware" if machine["bfloat16_units"] else "emulated: dtype auto means float32 here"),
        f"  {'freed memory':14} {machine['freed_memory'] or 'torch decides, on a GPU'}",
        f"  {'compiler':14} {machine['compiler'] or 'none: CPU kernels cannot be compiled'}",
        f"operations on {machine['device']}",
    ]
    if machine["slower"]:
        lines.insert(-1, f"  {'slower':14} {machine['slower']}")
    lines += [
        f"  {operation:14} {choice['backend']}: {choice['reason']}"
        for operation, choice in findings["operations"].items()
    ]
    return "\n".join(lines)

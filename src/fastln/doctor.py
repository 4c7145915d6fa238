"""Shows the machine, the backend of each operation and why, and what `prepare` would change in a model."""

from __future__ import annotations

import platform
import shlex
from typing import Any

import psutil
import torch

from fastln.errors import FastLNError
from fastln.machine import (
    arena_limit,
    cpu_flags,
    cpu_model,
    memory_limit,
    settle_device,
    why_no_arena,
)
from fastln.ops.backends import OPERATIONS, resolve
from fastln.ops.settings import DEFAULT, OpSettings
from fastln.rates import has_bfloat16_units, product_rates
from fastln.versions import package_version
from fastln_kernels.cpu import library, native_linear, products, units

PACKAGES = ("fastln", "torch", "triton", "transformers", "peft", "accelerate", "flash-attn", "liger-kernel")
VECTORS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "sve", "bf16")
WIDER_THAN_128_BITS = {"avx2", "avx512f", "sve"}


def examine(model: str | None = None, products: str = "exact") -> dict[str, Any]:
    """Examine the machine, without changing anything in this process.

    Args:
        model: A model, as `fastln.models.outline` takes it. The plan is for the device that "auto" gives.
        products: The plan's products, as `fastln.plan` takes them.

    Returns:
        `packages` (version or None), `machine`, `units` (the rates of products of blocks on this CPU and what they
        serve; None if they do not work or the device is another), `int8` (whether 8-bit products pay by these rates;
        None without such units), `operations` (for each the backend that "auto" gives on the default device, and why),
        `tricks` (what `prepare` may change, with the gain and risk of each) and `plan` (the lines of its table; None
        without a model).

    Raises:
        FastLNError: If there is no such model, or no such products, or products without a model.
    """
    from fastln.int8_rules import describe_gain
    from fastln.standins.tricks import TRICKS

    if model is None and products != "exact":
        raise FastLNError(
            f"products {products!r} are for the plan of a model: fastln doctor MODEL --products {products}"
        )
    device = settle_device("auto")
    flags = cpu_flags()
    choices = {operation: resolve(operation, device, DEFAULT) for operation in OPERATIONS}
    limit = memory_limit()
    served = _units() if device.type == "cpu" else None
    return {
        "packages": {package: package_version(package) for package in PACKAGES},
        "machine": {
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "cpu": cpu_model(),
            "cpu_vectors": [flag for flag in VECTORS if flag in flags],
            "threads": torch.get_num_threads(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "memory_limit_gib": round(limit.n_bytes / 2**30, 1),
            "memory_limit": limit.source,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "bfloat16_units": has_bfloat16_units(device),
            "product_rates": product_rates(device) if has_bfloat16_units(device) else None,
            "freed_memory": _freed_memory(device),
            "compiler": shlex.join(library.compiler()) or None,
            "device": str(device),
            "slower": _slower(flags) if device.type == "cpu" else None,
        },
        "units": served,
        "int8": describe_gain() if served is not None else None,
        "operations": {
            operation: {"backend": choice.backend, "reason": choice.reason} for operation, choice in choices.items()
        },
        "tricks": {trick.name: {"gains": trick.gains, "risk": trick.risk} for trick in TRICKS.values()},
        "plan": None if model is None else _plan(model, device, products),
    }


def _bfloat16(rates: dict[str, float] | None) -> str:
    """Say how fast bfloat16 is here, and so what dtype auto means."""
    if rates is None:
        return "emulated: dtype auto means float32 here"
    faster = max(rates, key=lambda name: rates[name])
    measured = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in rates.items())
    return f"in hardware; GFLOP/s measured: {measured}, so dtype auto means {faster} here"


def _units() -> dict[str, dict[str, Any]] | None:
    """Return for each dtype the rate of one thread (None without such products) and what is multiplied in it."""
    if products.why_not("linear"):  # then the backends of the operations say why
        return None
    rates, forced = units.rates(), units.forced()
    chosen = str(units.compute_dtype(torch.bfloat16, quietly=True)).removeprefix("torch.")
    why = f"by {units.VARIABLE}" if forced else "the faster" if "bfloat16" in rates else "there are no others"
    exact = "float32 rows"
    if not units.float32_pays(native_linear.linear, quietly=True):
        by = {name: f"{rate / 1e9:,.0f}" for name, rate in units.linear_rates(native_linear.linear).items()}
        exact += f" of attention (linear layers run on torch's own products: {by['torch']} GFLOP/s, not {by['fastln']})"
    served = {
        "float32": [exact],
        "bfloat16": [],
        "int8": ["8-bit products"] if "int8" in rates else ["no 8-bit products: they need AVX-512 VNNI or AMX"],
    }
    served[chosen].append(f"bfloat16 rows ({why})")
    return {name: {"rate": rates.get(name), "serves": ", ".join(words)} for name, words in served.items()}


def _freed_memory(device: torch.device) -> str:
    """Say who keeps the memory of freed large tensors while a model is prepared."""
    if reason := why_no_arena(device):
        return f"torch's allocator decides ({reason})"
    limit = arena_limit()
    return (
        f"prepare() keeps that of large tensors for the next step, up to {limit.n_bytes / 2**30:.1f} GiB "
        f"({limit.source}); without=('arena',) or FASTLN_KEEP_PAGES=0 leaves torch's allocator"
    )


def _slower(flags: set[str]) -> str | None:
    """Say why the CPU kernels are slower on this machine; None if they are not."""
    lacks = []
    if why := library.why_not("norm"):
        lacks.append(f"every operation runs without compiled kernels ({why})")
    elif why := products.why_not("attention") or products.why_not("linear"):
        lacks.append(f"attention and frozen linear layers run on torch's own code ({why})")
    if flags and not flags & WIDER_THAN_128_BITS:
        lacks.append("kernels run on vectors of 128 bits, since this CPU has no AVX2, AVX-512 or SVE")
    return "; ".join(lacks) or None


def _plan(model: str, device: torch.device, products: str) -> list[str]:
    OpSettings(products=products)  # raises for an unknown name, before the model is looked up
    # Imported here because transformers' models take seconds to import.
    from fastln.models.outline import outline
    from fastln.plan import plan

    return plan(outline(model), device=device, products=products).table().splitlines()


def render(findings: dict[str, Any]) -> str:
    """Format what `examine` found as text."""
    machine = findings["machine"]
    memory = f"{machine['memory_gib']} GiB"
    if machine["memory_limit_gib"] < machine["memory_gib"]:
        memory += f", of which {machine['memory_limit_gib']} GiB may be used ({machine['memory_limit']})"
    lines = ["packages"]
    lines += [f"  {name:16} {version or 'not installed'}" for name, version in findings["packages"].items()]
    lines += [
        "machine",
        f"  {'system':16} {machine['system']}, Python {machine['python']}",
        f"  {'cpu':16} {machine['cpu']}, {machine['threads']} thread(s)",
        f"  {'memory':16} {memory}",
        f"  {'vectors':16} {' '.join(machine['cpu_vectors']) or 'none known'}",
        f"  {'gpu':16} {machine['gpu'] or 'none'}",
        f"  {'bfloat16':16} " + _bfloat16(machine["product_rates"]),
        f"  {'freed memory':16} {machine['freed_memory']}",
        f"  {'compiler':16} {machine['compiler'] or 'none: CPU kernels cannot be compiled'}",
    ]
    if machine["slower"]:
        lines.append(f"  {'slower':16} {machine['slower']}")
    if findings["units"] is not None:
        lines.append("units that multiply blocks on this CPU, measured on one thread")
        for name, unit in findings["units"].items():
            rate = f"{unit['rate'] / 1e9:,.0f} GFLOP/s" if unit["rate"] else "none"
            lines.append(f"  {name:16} {rate:16} {unit['serves'] or '-'}")
        if findings["int8"]:
            lines.append(f"  products='int8' {findings['int8']}")
    lines.append(f"operations on {machine['device']}")
    lines += [
        f"  {operation:16} {choice['backend']}: {choice['reason']}"
        for operation, choice in findings["operations"].items()
    ]
    lines.append("what prepare() may change (leave out with without=(...))")
    lines += [f"  {name:16} {trick['gains']} (risk: {trick['risk']})" for name, trick in findings["tricks"].items()]
    if findings["plan"] is not None:
        lines += ["what prepare() would do with this model", *(f"  {line}" for line in findings["plan"])]
    return "\n".join(lines)

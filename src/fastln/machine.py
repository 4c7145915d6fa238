"""What this machine has, and what "auto" means on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from fastln.errors import FastLNError
from fastln_kernels.cpu import memory
from fastln_kernels.cpu.library import KernelsUnavailableError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ("auto", "cpu", "cuda")


def settle_device(name: str) -> torch.device:
    """Return the device that `name` means: "cpu", "cuda", or "auto" for a GPU where there is one.

    Raises:
        FastLNError: for another name, or "cuda" where torch sees no GPU.
    """
    if name not in DEVICES:
        raise FastLNError(f"unknown device {name!r} (valid: {', '.join(DEVICES)})")
    if name == "cuda" and not torch.cuda.is_available():
        raise FastLNError("device cuda: torch sees no GPU here; choose auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def settle_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that `name` means: "auto" is bfloat16 where the device has units for it, else float32.

    Raises:
        FastLNError: for another name.
    """
    if name == "auto":
        return torch.bfloat16 if has_bfloat16_units(device) else torch.float32
    if name not in DTYPES:
        raise FastLNError(f"unknown dtype {name!r} (valid: auto, {', '.join(DTYPES)})")
    return DTYPES[name]


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not mkldnn's own question, which says yes where bfloat16 is emulated, at a loss.
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & cpu_flags())


def keep_pages() -> str:
    """Have this process keep the memory of large CPU tensors that are freed, for the next step to use as it is.

    A training step frees and asks again for the same large tensors. Left alone, the C library gives the largest back
    to the system at once; each page is then mapped and zeroed again, at the next touch. Memory that a process has had
    for tensors of 64 KiB and more stays theirs instead, until it ends. `FASTLN_KEEP_PAGES=0` leaves torch alone.

    Returns:
        What was done, in words for a user.
    """
    if os.environ.get("FASTLN_KEEP_PAGES", "1") == "0":
        return "as the C library pleases (FASTLN_KEEP_PAGES=0)"
    try:
        memory.keep()
    except KernelsUnavailableError as error:
        return f"as the C library pleases ({error})"
    return "of large tensors kept for the next step (FASTLN_KEEP_PAGES=0: as the C library pleases)"


def cpu_flags() -> set[str]:
    """The instruction sets that the kernel reports; empty where it does not."""
    return set((_cpu_info("flags") or _cpu_info("Features") or "").split())


def cpu_model() -> str:
    """The processor's name."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def package_version(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_info(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)

"""What this machine has, and what "auto" means on it."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from fastln.errors import FastLNError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ("auto", "cpu", "cuda")
# M_MMAP_MAX: no mappings of their own for large blocks. M_TRIM_THRESHOLD: the heap's end stays, of whatever size (-1).
# M_TOP_PAD: it grows by 64 MiB at a time. The numbers are those of glibc's malloc.h.
_KEEP_PAGES = ((-4, 0), (-1, -1), (-2, 64 << 20))


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


@functools.cache
def keep_pages() -> str:
    """Have the C library keep the memory that this process frees, for the next step to use as it is.

    A training step frees and asks again for the same large tensors. By default glibc gives those of 32 MiB and more
    back to the system at once, and the end of its heap every so often; each page is then mapped and zeroed again, at
    the next touch. Memory that a process has had stays its own instead, until it ends. `FASTLN_KEEP_PAGES=0` leaves
    the C library alone; only glibc is known to have the switches.

    Returns:
        What was done, in words for a user.
    """
    if os.environ.get("FASTLN_KEEP_PAGES", "1") == "0":
        return "given back to the system when freed (FASTLN_KEEP_PAGES=0)"
    if platform.libc_ver()[0] != "glibc":
        return "as the C library pleases: it is not glibc"
    mallopt = ctypes.CDLL(None).mallopt
    if not all(mallopt(option, value) for option, value in _KEEP_PAGES):
        return "as the C library pleases: glibc refused"
    return "kept for the next step when freed (glibc; FASTLN_KEEP_PAGES=0 to give it back)"


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

"""Where a row comes from: machine, versions, commit. Called in a process of its own, since asking a GPU wakes it."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

from fastln.errors import FastLNError


def settle(device: str, dtype: str) -> tuple[str, str, dict[str, Any]]:
    """Turn "auto" into what this machine has, and describe the machine.

    Args:
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "float32" or "bfloat16".

    Returns:
        The device, the dtype, and the provenance: `machine`, `versions`, `commit`.

    Raises:
        FastLNError: "cuda" where there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise FastLNError("device cuda: torch sees no GPU here: choose auto or cpu")
    if dtype == "auto":
        dtype = "bfloat16" if _has_bfloat16_units(device) else "float32"
    provenance = {
        "machine": {
            "cpu": _cpu_model(),
            "cores": psutil.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "commit": _commit(),
    }
    return device, dtype, provenance


_PACKAGES = ("torch", "triton", "transformers", "peft", "fastln")


def _has_bfloat16_units(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Not mkldnn's own question, which says yes where bfloat16 is emulated, at a loss.
    return any(flag in _cpu_flags() for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def _cpu_info(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _cpu_flags() -> list[str]:
    return (_cpu_info("flags") or _cpu_info("Features") or "").split()


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of fastln's own source, with "-dirty" if it was changed since; None if it is no checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=30, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy can lie inside somebody else's checkout: only a tracked file makes it ours.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")

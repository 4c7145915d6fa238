"""Provenance of a row: machine, versions, commit.

Call this in a separate process: querying a GPU initialises CUDA.
"""

import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

from fastln.machine import cpu_model, settle_device
from fastln.rates import settle_dtype
from fastln.versions import package_version


def settle(device: str, *dtypes: str) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """Resolve "auto" to what this machine has, and describe the machine.

    Args:
        device: "auto", "cpu" or "cuda".
        *dtypes: Each is "auto", "float32" or "bfloat16".

    Returns:
        The device, the dtypes without duplicates, and the provenance: `machine`, `versions`, `commit`.

    Raises:
        FastLNError: If a name is unknown, or for "cuda" on a machine without a GPU.
    """
    place = settle_device(device)
    settled = (str(settle_dtype(dtype, place)).removeprefix("torch.") for dtype in dtypes)
    provenance = {
        "machine": {
            "cpu": cpu_model(),
            "cores": psutil.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_bytes": psutil.virtual_memory().total,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in _PACKAGES}},
        "commit": _commit(),
    }
    return str(place), tuple(dict.fromkeys(settled)), provenance


_PACKAGES = ("torch", "triton", "transformers", "peft", "fastln")


def _commit() -> str | None:
    """Return the commit of fastln's source, with "-dirty" if files have changed; None outside a git checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=30, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy can lie inside another project's checkout. It is our checkout only if git tracks this file.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")

"""The machine: its devices and its memory limits."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from fastln.errors import FastLNError
from fastln_kernels.cpu import memory

logger = logging.getLogger(__name__)

DEVICES = ("auto", "cpu", "cuda")


def settle_device(name: str) -> torch.device:
    """Return the device that `name` means: "cpu", "cuda", or "auto" for a GPU if there is one.

    Raises:
        FastLNError: for an unknown name, or "cuda" if torch sees no GPU.
    """
    if name not in DEVICES:
        raise FastLNError(f"unknown device {name!r} (valid: {', '.join(DEVICES)})")
    if name == "cuda" and not torch.cuda.is_available():
        raise FastLNError("device cuda: torch sees no GPU here; choose auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@dataclass(frozen=True)
class MemoryLimit:
    """How much memory may be used.

    Attributes:
        n_bytes: The limit, in bytes.
        source: What sets it, in words for users.
    """

    n_bytes: int
    source: str


def memory_limit(proc: Path = Path("/proc/self")) -> MemoryLimit:
    """Return how much memory this process may use: the machine's, or less if a cgroup (a container) limits it.

    Args:
        proc: The process's folder; its files `cgroup` and `mountinfo` say where the limits are.
    """
    physical = psutil.virtual_memory().total
    in_cgroup = min(_cgroup_limits(proc), default=physical)
    if in_cgroup < physical:
        return MemoryLimit(in_cgroup, "the cgroup's limit")
    return MemoryLimit(physical, "the machine's memory")


def arena_limit() -> MemoryLimit:
    """Return the limit of the arena of large CPU tensors: `memory_limit`, or half of what `ulimit -v` leaves."""
    limit = memory_limit()
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if addresses == resource.RLIM_INFINITY:
        return limit
    half = max(0, addresses - psutil.Process().memory_info().vms) // 2
    return MemoryLimit(half, "half of what ulimit -v leaves") if half < limit.n_bytes else limit


def return_freed_memory() -> None:
    """Give memory that the C library holds, but nobody uses, back to the system; do nothing where it cannot."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def why_no_arena(device: torch.device) -> str | None:
    """Say why `install_arena` cannot serve a model on `device`; None if it can. This changes nothing."""
    if device.type != "cpu":
        return f"the arena is for CPU tensors, and the model is on {device.type}"
    if os.environ.get("FASTLN_KEEP_PAGES", "1") == "0":
        return "FASTLN_KEEP_PAGES=0 switches it off"
    if reason := memory.why_not():
        return reason
    limit = arena_limit()
    if not memory.users() and limit.n_bytes < memory.MIN_BYTES:
        return f"{limit.source} is {limit.n_bytes >> 20} MiB, and the arena needs {memory.MIN_BYTES >> 20} MiB"
    return None


def install_arena() -> None:
    """Keep the memory of freed large CPU tensors in this process, so that the next step can reuse it.

    A training step frees large tensors and then allocates the same sizes again. Without the arena, the C library
    returns the largest ones to the system at once, and the system maps and zeroes their pages again on the next use.
    The arena keeps the memory of tensors of 64 KiB and more. Each call adds one user; `release_arena` undoes one call.

    Raises:
        KernelsUnavailableError: If torch or the system refuses; `why_no_arena` tells in advance.
    """
    limit = arena_limit()
    if n_bytes := memory.install(limit.n_bytes):
        logger.info(
            "CPU memory: fastln keeps freed memory of large tensors for the next step, up to %.1f GiB (%s); "
            "without=('arena',) or FASTLN_KEEP_PAGES=0 leaves torch's allocator",
            n_bytes / 2**30,
            limit.source,
        )


def release_arena() -> None:
    """Undo one `install_arena`. The last call restores torch's allocator and returns free memory to the system."""
    memory.release()


def usable_cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_flags() -> set[str]:
    """Return the instruction sets that the kernel reports; empty if it reports none."""
    return set((_cpu_info("flags") or _cpu_info("Features") or "").split())


def cpu_model() -> str:
    """Return the processor's name."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _cgroup_limits(proc: Path) -> Iterator[int]:
    """Yield the limits, in bytes, of this process's cgroup and its parents, for cgroup versions 1 and 2."""
    try:
        groups = (proc / "cgroup").read_text().splitlines()
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:  # not Linux
        return
    paths = {}
    for group in groups:  # "4:memory:/group", or "0::/group" for version 2
        number, controllers, path = group.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            paths["cgroup2" if number == "0" else "cgroup"] = path
    for mount in mounts:  # "31 23 0:28 ROOT POINT options ... - TYPE source options"
        before, _, after = mount.partition(" - ")
        root, point = before.split()[3:5]
        kind, *_, options = after.split()
        if kind not in paths or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        # A container sees its own group as the root of the mount, even if `cgroup` gives another path.
        folder = Path(point, os.path.relpath(paths[kind], root))
        folder = folder if Path(paths[kind]).is_relative_to(root) and folder.is_dir() else Path(point)
        while folder.is_relative_to(point):
            for name in ("memory.max", "memory.limit_in_bytes"):
                if (folder / name).is_file() and (limit := (folder / name).read_text().strip()) != "max":
                    yield int(limit)
            folder = folder.parent

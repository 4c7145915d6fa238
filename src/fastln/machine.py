"""What this machine has, and what "auto" means on it."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from packaging.specifiers import SpecifierSet

from fastln.errors import FastLNError
from fastln_kernels.cpu import memory

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ("auto", "cpu", "cuda")

TESTED_VERSIONS = {"torch": ">=2.13,<2.14", "transformers": ">=5.23,<5.24"}
"""The versions that fastln is tested with, as in pyproject.toml. It uses private parts of these packages."""


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


@dataclass(frozen=True)
class MemoryLimit:
    """How much memory may be used.

    Attributes:
        n_bytes: That much.
        source: What sets this limit, in words for a user.
    """

    n_bytes: int
    source: str


def memory_limit(proc: Path = Path("/proc/self")) -> MemoryLimit:
    """Return how much memory this process may use: the machine's, or the limit of a cgroup (a container) if less.

    Args:
        proc: The process's folder, in which `cgroup` and `mountinfo` say where the limits stand.
    """
    physical = psutil.virtual_memory().total
    in_cgroup = min(_cgroup_limits(proc), default=physical)
    if in_cgroup < physical:
        return MemoryLimit(in_cgroup, "the cgroup's limit")
    return MemoryLimit(physical, "the machine's memory")


def arena_limit() -> MemoryLimit:
    """Return how much the arena of large CPU tensors may hold: `memory_limit`, or half of what `ulimit -v` leaves."""
    limit = memory_limit()
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if addresses == resource.RLIM_INFINITY:
        return limit
    half = max(0, addresses - psutil.Process().memory_info().vms) // 2
    return MemoryLimit(half, "half of what ulimit -v leaves") if half < limit.n_bytes else limit


def why_no_arena(device: torch.device) -> str | None:
    """Say why `install_arena` would not do for a model on `device`; None where it would. It replaces nothing."""
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
    """Have this process keep the memory of large CPU tensors that are freed, for the next step to use as it is.

    A training step frees large tensors and asks for the same ones again. Without the arena, the C library gives the
    largest back to the system at once, which maps and zeroes each page again at the next touch. In the arena, memory
    stays for tensors of 64 KiB and more. Each call counts one user more; `release_arena` undoes one call.

    Raises:
        KernelsUnavailableError: If torch or the system refuses; `why_no_arena` says so before.
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
    """Undo one `install_arena`; after the last one torch's allocator is back, and free memory goes to the system."""
    memory.release()


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


def warn_of_untested_versions() -> None:
    """Warn, in one line, of versions of torch and transformers that fastln is not tested with.

    `FASTLN_UNTESTED_VERSIONS=1` silences it, for who tests just that (`make test-newest`).
    """
    if os.environ.get("FASTLN_UNTESTED_VERSIONS", "0") != "0":
        return
    found = {package: package_version(package) for package in TESTED_VERSIONS}
    untested = [
        f"{package} {version} (tested: {TESTED_VERSIONS[package]})"
        for package, version in found.items()
        if version is not None and not SpecifierSet(TESTED_VERSIONS[package]).contains(version, prereleases=True)
    ]
    if untested:
        logger.warning(
            "fastln is not tested with %s: results may be wrong; install a tested version, or set "
            "FASTLN_UNTESTED_VERSIONS=1 to silence this",
            " and ".join(untested),
        )


def _cpu_info(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _cgroup_limits(proc: Path) -> Iterator[int]:
    """Yield the limits, in bytes, of this process's cgroup and of those around it, of versions 1 and 2."""
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
        # A container sees its own group as the root of the mount, whatever path it is told.
        folder = Path(point, os.path.relpath(paths[kind], root))
        folder = folder if Path(paths[kind]).is_relative_to(root) and folder.is_dir() else Path(point)
        while folder.is_relative_to(point):
            for name in ("memory.max", "memory.limit_in_bytes"):
                if (folder / name).is_file() and (limit := (folder / name).read_text().strip()) != "max":
                    yield int(limit)
            folder = folder.parent

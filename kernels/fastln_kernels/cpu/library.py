"""C++ kernels for CPUs. The machine's compiler builds them at first use; later processes reuse them.

Each source file `NAME.cpp` in this folder becomes one shared library with a C interface. Except for `memory.cpp`, the
sources include no torch headers and link no libraries. So they compile in seconds and do not depend on torch's version.
They use the OpenMP runtime that torch has loaded (`parallel.h`). Libraries are stored in `$FASTLN_CACHE`, else
`$XDG_CACHE_HOME/fastln`, else `~/.cache/fastln`. Their names contain a hash of everything that they depend on: sources,
compiler, flags, processor.

Environment variables: `FASTLN_CPU_KERNELS=0` turns compiled kernels off. `CXX` sets the compiler. `FASTLN_CPU_ARCH`
replaces `native` in `-march=native`. `FASTLN_CPU_WARNINGS=1` turns every warning about our sources into an error (for
tests). `FASTLN_CPU_UNIT=bfloat16` or `float32` says in which of them bfloat16 rows are multiplied, instead of the
faster (`units.py`).
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("fastln")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes of the kernels' rows and parameters, with their numbers in `dispatch.h`."""

SOURCES = Path(__file__).parent
# NaN and Inf must pass through, so these are only the parts of -ffast-math that do not change values.
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
_WARNINGS = ("-Wall", "-Wextra")
_TORCH = Path(torch.__file__).parent
# Extra flags by source: torch's headers and core library, and torch's version, so that a new torch triggers a rebuild.
_MORE_FLAGS = {"memory": (f"-DTORCH={torch.__version__}", "-isystem", f"{_TORCH}/include", f"-L{_TORCH}/lib", "-lc10")}
_COMPILERS = ("c++", "g++", "clang++")


class KernelsUnavailableError(Exception):
    """Compiled kernels are not available. The message says why."""


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """Return the library built from `name`.cpp. It is compiled now if it is not in the cache.

    Raises:
        KernelsUnavailableError: If the kernels are turned off, there is no compiler, or the compiler fails. In the last
            two cases a warning is logged, once for each cause: without a compiler all libraries have the same one.
    """
    if os.environ.get("FASTLN_CPU_KERNELS", "1") == "0":
        raise KernelsUnavailableError("FASTLN_CPU_KERNELS=0 turns the compiled kernels off")
    try:
        return ctypes.CDLL(str(_build(name)))
    except (KernelsUnavailableError, OSError) as error:
        _warn(name, str(error))
        raise KernelsUnavailableError(str(error)) from error


_told: set[str] = set()  # the causes


def _warn(name: str, cause: str) -> None:
    if cause not in _told:
        _told.add(cause)
        logger.warning(
            "%s on CPUs, and all else that fails alike, runs without compiled kernels, so steps are slower: %s",
            name,
            cause,
        )


@functools.cache
def why_not(name: str) -> str | None:
    """Say why the library of `name`.cpp is not available; None if it is."""
    try:
        load(name)
    except KernelsUnavailableError as error:
        return str(error)
    return None


def function(name: str, symbol: str, arguments: Sequence[Any]) -> Any:
    """Return a function from the library of `name`.cpp. It takes `arguments` (ctypes types) and returns nothing.

    Raises:
        KernelsUnavailableError: As for `load`.
    """
    found = getattr(load(name), symbol)
    found.argtypes, found.restype = arguments, None
    return found


def cache_directory() -> Path:
    """Return the folder where compiled libraries are stored."""
    if "FASTLN_CACHE" in os.environ:
        return Path(os.environ["FASTLN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastln"


def compiler() -> list[str]:
    """Return the command of the C++ compiler, `CXX` if it is set; empty if there is no compiler."""
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    return next(([path] for name in _COMPILERS if (path := shutil.which(name))), [])


def _build(name: str) -> Path:
    """Return the path of a library. Compile it now if it is not there; several processes may do so at once."""
    command = compiler()
    if not command:
        raise KernelsUnavailableError(f"no C++ compiler: none of {', '.join(_COMPILERS)} is on the PATH")
    flags = [*_FLAGS, f"-march={os.environ.get('FASTLN_CPU_ARCH', 'native')}"]
    strict = os.environ.get("FASTLN_CPU_WARNINGS", "0") != "0"
    if strict:
        flags += _WARNINGS
    more_flags = _MORE_FLAGS.get(name, ())  # these come after the source, because they include libraries
    sources = [SOURCES / f"{name}.cpp", *sorted(SOURCES.glob("*.h"))]
    depends = hashlib.sha256()
    version = _run([*command, "--version"]).stdout
    for part in (
        *(source.read_text() for source in sources),
        version,
        *flags,
        *more_flags,
        processor(),
    ):
        depends.update(part.encode() + b"\0")
    directory = cache_directory()
    target = directory / f"{name}-{depends.hexdigest()[:32]}.so"
    if target.exists():
        return target
    logger.warning("compiling fastln's CPU kernels (%s.cpp), once for this machine, into %s", name, directory)
    start = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        made = Path(scratch) / target.name
        said = _run([*command, *flags, str(sources[0]), "-o", str(made), *more_flags]).stderr
        if said.strip():
            logger.debug("the compiler says about %s.cpp:\n%s", name, said.rstrip())
        # -Werror would not work: GCC 12 warns about its own AVX-512 headers.
        ours = [line for line in said.splitlines() if line.startswith(f"{SOURCES}/") and "warning:" in line]
        if strict and ours:
            raise KernelsUnavailableError(f"{len(ours)} compiler warnings, the first: {ours[0]}")
        made.replace(target)  # atomic, so that no process loads half a library
    logger.info("compiled %s.cpp in %.1f s", name, time.perf_counter() - start)
    return target


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailableError(f"{shlex.join(command)}: {error}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        first = next((line for line in said if "error" in line), said[0])
        raise KernelsUnavailableError(f"{command[0]} failed: {first}")
    return done


def processor() -> str:
    """Return the facts about the processor that -march=native depends on, as text."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))

"""Kernels in C++ for CPUs: compiled by the machine's compiler when they are first used, kept for all later processes.

A source file `NAME.cpp` beside this module, with the headers beside it, becomes one shared library with a C interface.
It includes nothing of torch and links nothing, so that it compiles in seconds and outlives torch's versions
(`memory.cpp` alone includes torch's headers). Its threads are those of the OpenMP runtime that torch has loaded
(`parallel.h`). Libraries lie in `$FASTLN_CACHE`, else `$XDG_CACHE_HOME/fastln`, else `~/.cache/fastln`, under the hash
of everything that they depend on: sources, compiler, flags, processor.

Environment: `FASTLN_CPU_KERNELS=0` switches compiled kernels off, `CXX` names the compiler, `FASTLN_CPU_ARCH` replaces
`native` in `-march=native`, and `FASTLN_CPU_WARNINGS=1` makes every warning about our sources an error (for tests).
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
"""The dtypes of the kernels' rows and parameters, as `dtypes.h` numbers them."""

SOURCES = Path(__file__).parent
# NaN and Inf must pass through, so of -ffast-math only what leaves values alone.
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
_WARNINGS = ("-Wall", "-Wextra")
_TORCH = Path(torch.__file__).parent
# What else a source needs: torch's headers and core library, and the version, so that another torch compiles it again.
_MORE_FLAGS = {"memory": (f"-DTORCH={torch.__version__}", "-isystem", f"{_TORCH}/include", f"-L{_TORCH}/lib", "-lc10")}
_COMPILERS = ("c++", "g++", "clang++")


class KernelsUnavailableError(Exception):
    """There are no compiled kernels; the message says why."""


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """Return the library made of `name`.cpp, compiled now if it is not in the cache.

    Raises:
        KernelsUnavailableError: If the kernels are switched off, or there is no compiler, or it fails (a warning says
            so).
    """
    if os.environ.get("FASTLN_CPU_KERNELS", "1") == "0":
        raise KernelsUnavailableError("FASTLN_CPU_KERNELS=0 switches the compiled kernels off")
    try:
        return ctypes.CDLL(str(_build(name)))
    except (KernelsUnavailableError, OSError) as error:
        logger.warning("%s on CPUs: no compiled code, so that steps are slower than they could be (%s)", name, error)
        raise KernelsUnavailableError(str(error)) from error


@functools.cache
def why_not(name: str) -> str | None:
    """Say why there is no library made of `name`.cpp; None where there is one."""
    try:
        load(name)
    except KernelsUnavailableError as error:
        return str(error)
    return None


def function(name: str, symbol: str, arguments: Sequence[Any]) -> Any:
    """Return a function of the library made of `name`.cpp, which returns nothing and takes `arguments` (ctypes).

    Raises:
        KernelsUnavailableError: As `load`.
    """
    found = getattr(load(name), symbol)
    found.argtypes, found.restype = arguments, None
    return found


def cache_directory() -> Path:
    """The folder where compiled libraries are kept."""
    if "FASTLN_CACHE" in os.environ:
        return Path(os.environ["FASTLN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastln"


def compiler() -> list[str]:
    """The command of the C++ compiler, `CXX` first; empty where there is none."""
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    return next(([path] for name in _COMPILERS if (path := shutil.which(name))), [])


def _build(name: str) -> Path:
    """Return the path of a library, compiled now if it is not there. Processes that do so at once do no harm."""
    command = compiler()
    if not command:
        raise KernelsUnavailableError(f"no C++ compiler: none of {', '.join(_COMPILERS)} is on the path")
    flags = [*_FLAGS, f"-march={os.environ.get('FASTLN_CPU_ARCH', 'native')}"]
    strict = os.environ.get("FASTLN_CPU_WARNINGS", "0") != "0"
    if strict:
        flags += _WARNINGS
    more_flags = _MORE_FLAGS.get(name, ())  # behind the source: libraries among them
    sources = [SOURCES / f"{name}.cpp", *sorted(SOURCES.glob("*.h"))]
    depends = hashlib.sha256()
    version = _run([*command, "--version"]).stdout
    for part in (*(source.read_text() for source in sources), version, *flags, *more_flags, _processor()):
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
        # Not -Werror: GCC 12 warns about its own AVX-512 headers.
        ours = [line for line in said.splitlines() if line.startswith(f"{SOURCES}/") and "warning:" in line]
        if strict and ours:
            raise KernelsUnavailableError(f"{len(ours)} warnings, the first: {ours[0]}")
        made.replace(target)  # at once: nobody sees half a library
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
        raise KernelsUnavailableError(f"{command[0]} fails: {first}")
    return done


def _processor() -> str:
    """What -march=native looks at."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))

"""Which of the processor's units, and whose products, are fastest, measured once per machine.

Vector units that multiply bfloat16 can be slower than the same processor's float32: by half on Intel's servers without
matrix units. Rows in bfloat16 are then converted in the cache and multiplied as float32. With AMX, or on Zen 4,
bfloat16 is faster.

Float32 rows of linear layers run in fastln's kernel only where torch's own product is slower, which depends on the
library that torch was built with and on the processor. So both are timed, too, when there are such rows.

The rates are kept in files beside the compiled libraries, so that every process on a machine chooses alike and its
results have the same bits. For bfloat16 rows, FASTLN_CPU_UNIT=bfloat16 or float32 chooses without regard to the
rates.
"""

import ctypes
import functools
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from ctypes import c_double
from pathlib import Path

import torch
from torch.nn import functional

from fastln_kernels.cpu import library, products
from fastln_kernels.cpu.library import KernelsUnavailableError

logger = logging.getLogger("fastln")

Linear = Callable[..., torch.Tensor]
VARIABLE = "FASTLN_CPU_UNIT"
UNITS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_NAMES = ("float32", "bfloat16", "float16", "int8")  # in the order of dispatch.h
_GAIN = 1.15  # float32 must be so many times as fast, because rows and weights are converted
_LINEAR_GAIN = 1.1  # fastln's kernel must be so many times as fast as torch's product: its calls take longer
_SHAPE = (128, 768, 768)  # rows and widths of the products that decide: so short that some are not interrupted
_ROUNDS = 32


def compute_dtype(dtype: torch.dtype, *, quietly: bool = False) -> torch.dtype:
    """Return the dtype in which blocks of this dtype are multiplied fastest on this machine.

    Args:
        dtype: float32, bfloat16 or float16. For bfloat16 it is bfloat16 or float32; for the others float32.
        quietly: Whether to log nothing, for who asks without having rows in bfloat16. Otherwise one line per process
            tells that float32 units multiply them.

    Raises:
        ValueError: If FASTLN_CPU_UNIT is neither empty, bfloat16 nor float32, or names products that do not work here.
    """
    if dtype != torch.bfloat16:
        return torch.float32
    wanted = forced()
    chosen = _for_bfloat16(wanted)
    if chosen == torch.float32 and not wanted and not quietly:
        _tell_float32()
    return chosen


def float32_pays(linear: Linear, *, quietly: bool = False) -> bool:
    """Whether fastln's kernel multiplies float32 rows of linear layers faster on this machine than torch does.

    Args:
        linear: The kernel: `native_linear.linear`.
        quietly: Whether to log nothing. Otherwise one line per process tells that torch multiplies them.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels.
    """
    measured = linear_rates(linear)
    pays = measured["fastln"] >= _LINEAR_GAIN * measured["torch"]
    if not pays and not quietly:
        _tell_torch(linear)
    return pays


def forced() -> str | None:
    """Return the choice of FASTLN_CPU_UNIT; None if it is empty or not set.

    Raises:
        ValueError: If it is no choice.
    """
    name = os.environ.get(VARIABLE)
    if name and name not in UNITS:
        raise ValueError(f"{VARIABLE} is {name!r}; it must be {' or '.join(UNITS)}, or unset")
    return name or None


@functools.cache
def _for_bfloat16(wanted: str | None) -> torch.dtype:
    measured = rates()
    if wanted:
        if measured and wanted not in measured:
            raise ValueError(f"{VARIABLE} is {wanted}, but {wanted} products do not work on this processor")
        return UNITS[wanted]
    float32, bfloat16 = (measured.get(name, 0.0) for name in ("float32", "bfloat16"))
    return torch.bfloat16 if float32 <= _GAIN * bfloat16 else torch.float32


@functools.cache
def _tell_float32() -> None:
    measured = rates()
    if "bfloat16" not in measured:
        logger.info("bfloat16 rows are multiplied as float32: this processor has no bfloat16 products")
        return
    logger.info(
        "bfloat16 rows are multiplied as float32: measured at %.0f GFLOP/s a thread here; bfloat16 reaches %.0f "
        "(%s=bfloat16 would take it)",
        measured["float32"] / 1e9,
        measured["bfloat16"] / 1e9,
        VARIABLE,
    )


@functools.cache
def _tell_torch(linear: Linear) -> None:
    measured = linear_rates(linear)
    logger.info(
        "float32 rows of frozen linear layers run on torch's own products: measured at %.0f GFLOP/s a thread here; "
        "fastln's kernel reaches %.0f",
        measured["torch"] / 1e9,
        measured["fastln"] / 1e9,
    )


@functools.cache
def rates() -> dict[str, float]:
    """Return the operations per second that one thread reaches in products of blocks, by the name of the dtype.

    The names are float32, bfloat16 and int8, without those whose products do not work here; none if no products work.
    They are measured, in a tenth of a second, unless this machine has a file of them.
    """
    try:
        return _kept_or(_measure, _file(), {"float32"})
    except KernelsUnavailableError:  # a warning has told why
        return {}


@functools.cache
def linear_rates(linear: Linear) -> dict[str, float]:
    """Return the operations per second that one thread reaches in a float32 linear layer, by "fastln" and by "torch".

    It has 128 rows and 768 columns, and runs forward and backward. The rates are measured, in less than a second,
    unless this machine has a file of them.

    Args:
        linear: As for `float32_pays`.

    Raises:
        KernelsUnavailableError: If there are no compiled kernels.
    """
    kernel = Path(library.load("linear")._name).name  # another one for other sources, compilers and flags
    path = _file("linear-rates", kernel, torch.get_float32_matmul_precision())
    return _kept_or(functools.partial(_measure_linear, linear), path, {"fastln", "torch"})


def _kept_or(measure: Callable[[], dict[str, float]], path: Path, needed: set[str]) -> dict[str, float]:
    kept = _read(path, needed)
    return _keep(path, measure(), needed) if kept is None else kept


def _measure() -> dict[str, float]:
    products.usable("units")  # passes the products to the library
    found = (c_double * len(_NAMES))()
    library.function("units", "fastln_unit_rates", (ctypes.POINTER(c_double),))(found)
    return {name: rate for name, rate in zip(_NAMES, found, strict=True) if rate}


def _measure_linear(linear: Linear) -> dict[str, float]:
    n_rows, n_inner, n_cols = _SHAPE
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            x, dy, weight = (
                torch.ones(size, device="cpu", dtype=torch.float32)
                for size in ((n_rows, n_inner), (n_rows, n_cols), (n_cols, n_inner))
            )
            runs: dict[tuple[str, str], Callable[[], object]] = {
                ("fastln", "y"): lambda: linear(x, weight),
                ("torch", "y"): lambda: functional.linear(x, weight),
                ("fastln", "dx"): lambda: linear(dy, weight, transpose=False),
                ("torch", "dx"): lambda: dy @ weight,
            }
            seconds: dict[tuple[str, str], list[float]] = {run: [] for run in runs}
            for _ in range(1 + _ROUNDS):  # the first is a warm-up
                for run, multiply in runs.items():
                    start = time.perf_counter()
                    multiply()
                    seconds[run].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(n_threads)
    best = {run: min(taken[1:]) for run, taken in seconds.items()}
    return {of: 4 * n_rows * n_inner * n_cols / (best[of, "y"] + best[of, "dx"]) for of in ("fastln", "torch")}


def _file(kind: str = "units", *more: str) -> Path:
    """Return the path of this machine's rates. Its name has a hash of all that they depend on, `more` too."""
    limits = sorted(f"{name}={value}" for name, value in os.environ.items() if _limits_instructions(name))
    depends = "\0".join((library.processor(), torch.__version__, *limits, *more))
    return library.cache_directory() / f"{kind}-{hashlib.sha256(depends.encode()).hexdigest()[:32]}.json"


def _limits_instructions(variable: str) -> bool:
    return "_CPU_ISA" in variable or variable == "MKL_ENABLE_INSTRUCTIONS"  # oneDNN's, MKL's


def _read(path: Path, needed: set[str]) -> dict[str, float] | None:
    """Return the rates in a file; None if there is none, its content is damaged, or one that is needed is missing."""
    try:
        kept = {name: float(rate) for name, rate in json.loads(path.read_text(encoding="utf-8")).items()}
        return kept if needed <= kept.keys() and min(kept.values()) > 0 else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def _keep(path: Path, measured: dict[str, float], needed: set[str]) -> dict[str, float]:
    """Write rates into a file, and return what is in it: the rates of the first process that wrote."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = Path(scratch) / path.name
            made.write_text(json.dumps(measured), encoding="utf-8")
            try:
                os.link(made, path)  # atomic, and fails if the file exists
            except OSError:
                if (kept := _read(path, needed)) is not None:
                    return kept
                made.replace(path)  # a damaged file, or a file system without links
    except OSError as error:
        logger.warning("the rates of this processor's units are measured again in each process: %s", error)
    return measured

"""How fast this machine multiplies matrices in each dtype, and the dtype that "auto" therefore means."""

from __future__ import annotations

import functools
import logging
import time

import torch

from fastln.errors import FastLNError
from fastln.machine import cpu_flags
from fastln.memory import synchronize
from fastln.processes import from_first_process
from fastln_kernels.cpu import products, units

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def settle_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that `name` means; "auto" is the one in which the device multiplies faster.

    Where the hardware has no units for bfloat16, "auto" is float32. Otherwise both rates are measured, which takes
    under a second, and a line in the log tells the result. If several processes train together, the first one measures.

    Args:
        name: "float32", "bfloat16" or "auto".
        device: Where the model runs.

    Raises:
        FastLNError: For an unknown name.
    """
    if name == "auto":
        if not has_bfloat16_units(device):
            return torch.float32
        return DTYPES[from_first_process(lambda: _faster(device), on_cpu=device.type == "cpu")]
    if name not in DTYPES:
        raise FastLNError(f"unknown dtype {name!r} (valid: auto, {', '.join(DTYPES)})")
    return DTYPES[name]


def _faster(device: torch.device) -> str:
    rates = product_rates(device)
    slower, faster = sorted(rates, key=lambda name: rates[name])
    logger.info(
        "dtype auto: %s, measured at %.0f GFLOP/s here; %s reaches %.0f (dtype=%s would take it)",
        faster,
        rates[faster] / 1e9,
        slower,
        rates[slower] / 1e9,
        slower,
    )
    return faster


@functools.cache
def product_rates(device: torch.device) -> dict[str, float]:
    """Measure the operations per second of matrix products in each dtype, once in this process.

    The product is small enough for a slow machine, and large enough for the rate of a layer.

    Args:
        device: Where to multiply.
    """
    return {name: matrix_rate(device, dtype, repeats=3, shape=(512, 1024, 2048)) for name, dtype in DTYPES.items()}


def floor_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the rate of the units that multiply a dtype: on a CPU, bfloat16 rows may run in those of float32.

    Args:
        device: Where to multiply.
        dtype: The dtype of the rows.
    """
    rate = matrix_rate(device, dtype)
    if device.type != "cpu" or products.why_not("linear") is not None:
        return rate
    return max(rate, matrix_rate(device, units.compute_dtype(dtype)))


def int8_product_rate(device: torch.device) -> float | None:
    """Measure the operations per second of 8-bit products with 32-bit sums, as `matrix_rate` does; None without units.

    Args:
        device: Where to multiply.
    """
    if device.type == "cpu" and products.why_not("int8") is not None:
        return None
    return matrix_rate(device, torch.int8)


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, which does not make it faster than float32 everywhere."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # mkldnn's own check also says yes if bfloat16 is emulated, which is slower than float32.
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & cpu_flags())


def matrix_rate(
    device: torch.device, dtype: torch.dtype, repeats: int = 10, shape: tuple[int, int, int] = (1024, 1024, 4096)
) -> float:
    """Measure how many operations per second a device reaches in a matrix product.

    The product is written into memory that is already allocated.

    Args:
        device: Where to multiply: a CPU or a GPU.
        dtype: Dtype of the factors and the product; int8 factors have an int32 product.
        repeats: How often to measure; the fastest counts.
        shape: Rows, inputs and outputs of the product; those of a typical layer by default.
    """
    n_rows, n_in, n_out = shape
    x, weight = (torch.randn(size, device=device).to(dtype) for size in ((n_rows, n_in), (n_out, n_in)))
    is_int8 = dtype == torch.int8
    multiply = torch._int_mm if is_int8 else torch.mm
    y = torch.empty(n_rows, n_out, device=device, dtype=torch.int32 if is_int8 else dtype)
    seconds = []
    for _ in range(1 + repeats):  # the first is a warm-up
        synchronize(device)
        start = time.perf_counter()
        multiply(x, weight.T, out=y)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n_rows * n_in * n_out / min(seconds[1:])

"""Devices by name: their memory, bandwidth and rates, from the vendors' data sheets.

All rates are *dense*. Data sheets often print twice as much, for matrices of which every other number is zero; those
figures are halved here. 16-bit products are those with sums in float32, as training runs them: GeForce cards do them at
half the rate that their advertisements give for sums in 16 bits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from fastln.errors import FastLNError

GB, TB, TERA = 1e9, 1e12, 1e12
GIB = 1 << 30

_TURING = "NVIDIA T4 Tensor Core GPU, product brief PB-09256-001"
_GA102 = "NVIDIA Ampere GA102 GPU architecture, V2.0, appendix A"
_ADA = "NVIDIA Ada GPU architecture, V2.01, appendix A"
_RTX_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture, V1.0, appendix A"
_A100 = "NVIDIA A100 Tensor Core GPU, data sheet (SXM)"
_H100 = "NVIDIA H100 Tensor Core GPU, data sheet (SXM); its figures with sparsity, halved"
_H200 = "NVIDIA H200 Tensor Core GPU, data sheet (SXM); its figures with sparsity, halved"
_B200 = "NVIDIA HGX B200, data sheet, an eighth; its figures with sparsity, halved"
_MI300X = "AMD Instinct MI300X accelerator, data sheet"


@dataclass(frozen=True, slots=True)
class Device:
    """A device that models can train on.

    Attributes:
        name: Its usual name.
        memory: Bytes of memory. Drivers, libraries and their contexts take part of it.
        bandwidth: Bytes per second between memory and chip.
        rates: Operations per second of dense matrix products, by the name of the factors' dtype. Dtypes without units
            of their own are missing.
        source: Where the figures are from.
        kind: "cuda" for GPUs, as torch names them (AMD's too), or "cpu".
        aliases: Further names.
    """

    name: str
    memory: int
    bandwidth: float
    rates: Mapping[str, float]
    source: str
    kind: str = "cuda"
    aliases: tuple[str, ...] = ()

    def rate(self, dtype: str) -> tuple[float, str]:
        """Return the rate of products in a dtype, and the dtype whose units multiply: float32 where it has none."""
        served = dtype if dtype in self.rates else "float32"
        return self.rates[served], served


def _rates(float32: float, bfloat16: float | None, float16: float, int8: float) -> dict[str, float]:
    given = {"float32": float32, "bfloat16": bfloat16, "float16": float16, "int8": int8}
    return {name: rate * TERA for name, rate in given.items() if rate is not None}


def _sizes(name: str, n_gigabytes: int) -> tuple[str, ...]:
    return (f"{name} {n_gigabytes}", f"{name} {n_gigabytes} GB", f"{name} SXM4 {n_gigabytes} GB")


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("T4", 16 * GIB, 320 * GB, _rates(8.1, None, 65, 130), _TURING, aliases=("Tesla T4",)),
        # No architecture paper has this card: the rates are those of GA102's multiprocessors, 28 at 1.777 GHz.
        Device("RTX 3060", 12 * GIB, 360 * GB, _rates(12.7, 25.5, 25.5, 102), f"28 SMs at 1.777 GHz as in {_GA102}"),
        Device("RTX 3090", 24 * GIB, 936 * GB, _rates(35.6, 71, 71, 284), _GA102),
        Device("RTX 4090", 24 * GIB, 1008 * GB, _rates(82.6, 165.2, 165.2, 660.6), _ADA),
        Device("RTX 5090", 32 * GIB, 1792 * GB, _rates(104.8, 209.5, 209.5, 838), _RTX_BLACKWELL),
        Device("A100 SXM 40 GB", 40 * GIB, 1.555 * TB, _rates(19.5, 312, 312, 624), _A100, aliases=_sizes("A100", 40)),
        Device(
            *("A100 SXM 80 GB", 80 * GIB, 2.04 * TB, _rates(19.5, 312, 312, 624), _A100),
            aliases=(*_sizes("A100", 80), "A100", "A100 SXM"),
        ),
        Device("H100 SXM", 80 * GIB, 3.35 * TB, _rates(67, 989, 989, 1979), _H100, aliases=("H100", "H100 80 GB HBM3")),
        Device("H200 SXM", 141 * GIB, 4.8 * TB, _rates(67, 989, 989, 1979), _H200, aliases=("H200",)),
        Device("B200", 180 * GIB, 8.0 * TB, _rates(75, 2250, 2250, 4500), _B200),
        Device("MI300X", 192 * GIB, 5.3 * TB, _rates(163.4, 1307, 1307, 2615), _MI300X, aliases=("Instinct MI300X",)),
    )
}
"""The known GPUs, by name."""

THIS_CPU = "cpu"
"""The name of the processor that this process runs on; `fastln.step_time.this_cpu` measures it."""


def find_device(name: str) -> Device:
    """Return a GPU by its name. Case, blanks and makers' names do not matter: "rtx4090", "NVIDIA GeForce RTX 4090".

    Raises:
        FastLNError: If no device has this name; the message tells the nearest ones.
    """
    known = {_plain(alias): device for device in DEVICES.values() for alias in (device.name, *device.aliases)}
    wanted = _plain(name)
    if wanted in known:
        return known[wanted]
    near = [known[key].name for key in get_close_matches(wanted, known, n=3, cutoff=0.5)]
    hint = f"; did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?" if near else ""
    raise FastLNError(f"unknown device {name!r}{hint} (known: {', '.join(DEVICES)}, and {THIS_CPU} for this processor)")


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|amd|[^a-z0-9]", "", name.lower())

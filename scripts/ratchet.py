"""Report where fastln's kernels got worse than the committed figures, or have faults of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from code_cases import CODE_CASES
from int8_cases import CASES8
from norm_cases import CASES
from report_rows import Row

RATCHET_WIDTH = 8192
BY_ROWS = (
    *("forward_kernel", "backward_kernel", "forward_wide_kernel", "backward_wide_kernel"),
    *("product_kernel", "forward_rows_kernel", "backward_rows_kernel", "again_kernel"),
    *("forward_codes_kernel", "backward_codes_kernel", "forward_gated_codes_kernel", "backward_gated_codes_kernel"),
    *("forward_rows_codes_kernel", "backward_rows_codes_kernel"),
)
LOSSES: dict[str, Callable[[dict[str, Any]], int]] = {
    "registers": lambda kernel: kernel["registers"],
    "loads that are not of 128 bits": lambda kernel: kernel["loads"] - kernel["loads_128"],
    "stores that are not of 128 bits": lambda kernel: kernel["stores"] - kernel["stores_128"],
}


def _key(row: Row, kernel: dict[str, Any]) -> tuple[str, ...]:
    return row.machine, row.dtype, str(row.width), row.case, kernel["kernel"]


def worse(rows: Sequence[Row], before: Sequence[Row]) -> Iterator[str]:
    """Yield a complaint for each fault of fastln's kernels, and for each loss up to `RATCHET_WIDTH` columns.

    Args:
        rows: The newly compiled rows.
        before: The rows of the committed file. A missing kernel counts as a loss.
    """
    earlier = {_key(row, kernel): kernel for row in before for kernel in row.compiled or () if row.library == "fastln"}
    for row in rows:
        if row.library != "fastln":
            continue
        if row.error:
            yield f"{row.machine} {row.dtype} {row.width} {row.case}: {row.error}"
        for kernel in row.compiled or ():
            key = _key(row, kernel)
            losses = _losses(kernel, earlier.get(key)) if row.width <= RATCHET_WIDTH else ()
            for fault in (*_faults(row, kernel), *losses):
                yield f"{' '.join(key)}: {fault}"


def _faults(row: Row, kernel: dict[str, Any]) -> Iterator[str]:
    if kernel["spills"]:
        yield f"{kernel['spills']} instructions spill"
    if not kernel["loads_128"]:
        yield "no 128-bit loads"
    # Sums are written as single rows, so they are exempt. AMD's compiler writes 16-bit results 8 bytes at a time, which
    # also fills whole lines. So do 8-bit results, of which a lane has 8 beside each other, and codes in fewer bits.
    writes_rows = kernel["kernel"] in BY_ROWS and (CASES | CASES8 | CODE_CASES)[row.case].writes_rows
    if writes_rows and row.machine != "gfx942" and not kernel["stores_128"]:
        yield "no 128-bit stores"
    if row.case in CASES8 and CASES8[row.case].product and not kernel["matrix"]:
        yield "no matrix instructions in 8 bits"
    if kernel["specialises_on_rows"]:
        yield "recompiles for a different number of rows"
    if kernel.get("truncations"):
        yield "truncates to bfloat16"
    if kernel.get("nan_dropped"):
        yield "drops NaN"


def _losses(kernel: dict[str, Any], then: dict[str, Any] | None) -> Iterator[str]:
    if then is None:
        yield "no earlier figures to compare with: check the new figures, then add them with --accept"
        return
    for what, figure in LOSSES.items():
        if figure(kernel) > figure(then):
            yield f"{figure(kernel)} {what}, {figure(then)} before"

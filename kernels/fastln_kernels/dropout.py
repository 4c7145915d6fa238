"""Dropout in Triton, and its random numbers. `reference.dropout_keep` defines which number belongs to which element.

No mask is stored. An element's number is a function of seed, row and column, so the backward draws it again.
"""

# mypy: allow-untyped-defs
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastln_kernels import launch
from fastln_kernels.reference import dropout_threshold


@triton.jit
def random_16_bits(seed, rows, first_col, N_ROWS: tl.constexpr, N_COLS: tl.constexpr, LANE_COLS: tl.constexpr):
    """Return `(N_ROWS, N_COLS)` numbers below 2^16, for `rows` (int64) and the columns starting at `first_col`.

    `LANE_COLS`, 8 or 4, is the number of neighbouring columns that a lane holds, so that each lane makes its own
    numbers. With 4 columns, a lane uses half of a Philox call. `first_col` and `N_COLS` are multiples of 8.
    """
    LANES: tl.constexpr = N_COLS // LANE_COLS
    shape: tl.constexpr = (N_ROWS, LANES)
    lanes = tl.broadcast_to((tl.arange(0, LANES) + first_col // LANE_COLS)[None, :], shape).to(tl.uint32)
    low = tl.broadcast_to(rows.to(tl.uint32)[:, None], shape)
    high = tl.broadcast_to((rows >> 32).to(tl.uint32)[:, None], shape)
    groups = lanes if LANE_COLS == 8 else lanes // 2
    w0, w1, w2, w3 = tl.philox(seed, groups, low, high, tl.zeros(shape, tl.uint32))
    # The last joined dimension varies fastest: low or high half, then even or odd word, then first or last two words.
    if LANE_COLS == 8:
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    else:
        odd = lanes % 2 == 1
        words = tl.join(tl.where(odd, w2, w0), tl.where(odd, w3, w1))
    numbers = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(numbers, (N_ROWS, N_COLS))


@triton.jit
def dropped_out(x, seed, rows, first_col, THRESHOLD: tl.constexpr, dtype: tl.constexpr):
    """Return the float32 tile `x` with dropout applied. `rows` and `first_col` give its place.

    This assumes that a lane holds 16 bytes of `dtype`, as many columns as it loads at once.
    """
    LANE_COLS: tl.constexpr = 128 // dtype.primitive_bitwidth
    numbers = random_16_bits(seed, rows, first_col, x.shape[0], x.shape[1], LANE_COLS)
    scale: tl.constexpr = 65536 / (65536 - THRESHOLD)
    return tl.where(numbers >= THRESHOLD, x * scale, 0.0)


@triton.jit(do_not_specialize=["n_rows"])
def dropout_kernel(
    x_ptr,
    seed_ptr,
    y_ptr,
    n_rows,
    x_stride,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    THRESHOLD: tl.constexpr,
):
    """Apply dropout to some columns of some rows."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    first_col = tl.program_id(1) * COLS
    cols = first_col + tl.arange(0, COLS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    inside = (rows < n_rows)[:, None] & (cols < N_COLS)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=inside, other=0.0)
    y = dropped_out(x.to(tl.float32), tl.load(seed_ptr), rows, first_col, THRESHOLD, dtype)
    tl.store(y_ptr + rows[:, None] * N_COLS + cols[None, :], y, mask=inside)


def dropout(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """Return `x` with dropout applied, as `fastln_kernels.reference.dropout` does."""
    n_rows, n_cols = x.shape
    x = x if x.stride(1) == 1 or n_cols == 1 else x.contiguous()
    y = torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device)
    if n_rows:
        tile = launch.COLUMN_TILE
        grid = (triton.cdiv(n_rows, tile.rows), triton.cdiv(n_cols, tile.cols))
        sizes = {"N_COLS": n_cols, "ROWS": tile.rows, "COLS": tile.cols, "THRESHOLD": dropout_threshold(dropout)}
        options = {"num_warps": tile.warps, "enable_fp_fusion": True}
        with launch.on_device(x.device):
            dropout_kernel[grid](x, seed, y, n_rows, x.stride(0), **sizes, **options)
    return y

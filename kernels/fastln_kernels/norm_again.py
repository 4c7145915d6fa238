"""A norm's result made again from what the forward kept of it: x_hat, in full or as codes of 8 bits.

No sum along a row is left, so any program takes any columns. `norm.py` has the launching function.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, misc, var-annotated"
import triton
import triton.language as tl

from fastln_kernels.norm_codes import decoded, load_scales
from fastln_kernels.tiles import load_vector_piece


@triton.jit(do_not_specialize=["n_rows"])
def again_kernel(
    saved_ptr,
    codes_scale_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    n_rows,
    saved_stride,
    N_COLS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    REPEATS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUND_NORMED: tl.constexpr,
):
    """Scale and shift `REPEATS` tiles of rows below each other, which share the loads of weight and bias."""
    BLOCKS_A_ROW: tl.constexpr = (N_COLS + COLS - 1) // COLS
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    first = (tl.program_id(0) // BLOCKS_A_ROW).to(tl.int64) * (REPEATS * ROWS) + tl.arange(0, ROWS)
    first_col = tl.program_id(0) % BLOCKS_A_ROW * COLS
    cols = first_col + tl.arange(0, COLS)
    tiles = ()
    scales = ()
    for k in tl.static_range(REPEATS):
        rows = first + k * ROWS
        inside = _inside(rows < n_rows, cols, N_COLS, COLS)
        tiles += (tl.load(saved_ptr + rows[:, None] * saved_stride + cols[None, :], mask=inside, other=0.0),)
        if codes_scale_ptr is not None:
            scales += (load_scales(codes_scale_ptr, rows, rows < n_rows, first_col, N_COLS, COLS),)
    if weight_ptr is not None:
        weight = load_vector_piece(weight_ptr, first < n_rows, cols, 0, N_COLS).to(tl.float32) + OFFSET
    if bias_ptr is not None:
        bias = load_vector_piece(bias_ptr, first < n_rows, cols, 0, N_COLS).to(tl.float32)
    for k in tl.static_range(REPEATS):
        rows = first + k * ROWS
        y = tiles[k].to(tl.float32) if codes_scale_ptr is None else decoded(tiles[k], scales[k])
        if ROUND_NORMED:
            y = y.to(dtype).to(tl.float32)
        if weight_ptr is not None:
            y *= weight
        if bias_ptr is not None:
            y += bias
        inside = _inside(rows < n_rows, cols, N_COLS, COLS)
        tl.store(y_ptr + rows[:, None] * N_COLS + cols[None, :], y, mask=inside)


@triton.jit
def _inside(in_rows, cols, N_COLS: tl.constexpr, COLS: tl.constexpr):
    if N_COLS % COLS == 0:
        return in_rows[:, None]
    else:
        return in_rows[:, None] & (cols < N_COLS)[None, :]

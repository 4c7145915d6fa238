"""Activations that keep codes for their backward: encoded in the forward's kernel, decoded in the backward's.

As in `activation.py`, a program processes a block of neighbouring elements of one row, of which each lane loads 16
bytes at once. The block is a tile `(groups, GROUP)` of groups that share a scale, which lie beside each other. Codes
have rows of whole bytes, `codes_a_row` apart.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment"
import triton
import triton.language as tl

from fastln_kernels.activation_values import times_slope, value
from fastln_kernels.code_values import (
    decode_slope,
    decode_symmetric,
    encode_slope,
    pack,
    symmetric,
    times_decoded,
    unpack,
)


@triton.jit
def _place(
    block,
    n_cols,
    k: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Return where piece `k` of a row's block starts (int64), its columns `(GROUPS, GROUP)` from there, and their mask.

    `VECTOR` neighbours share one mask value. With other `n_cols`, `GROUP` and `VECTOR`, those of codes.
    """
    start = (block * PIECES + k) * (GROUPS * GROUP)
    cols = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = cols < tl.minimum(n_cols - start, GROUPS * GROUP).to(tl.int32)
    return start, cols, tl.max_constancy(inside, [1, VECTOR])


@triton.jit
def _load_pieces(
    ptr,
    row,
    block,
    n_cols,
    stride,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Load the pieces of a row's block."""
    pieces = ()
    for k in tl.static_range(PIECES):
        start, cols, inside = _place(block, n_cols, k, GROUPS, GROUP, PIECES, VECTOR)
        pieces += (tl.load(ptr + (row * stride + start) + cols, mask=inside, other=0),)
    return pieces


@triton.jit
def _store_piece(
    ptr,
    piece,
    row,
    block,
    n_cols,
    stride,
    k: tl.constexpr,
    PIECES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    start, cols, inside = _place(block, n_cols, k, piece.shape[0], piece.shape[1], PIECES, VECTOR)
    tl.store(ptr + (row * stride + start) + cols, piece, mask=inside)


@triton.jit
def _scale_place(row, block, groups_a_row, k: tl.constexpr, GROUPS: tl.constexpr, PIECES: tl.constexpr):
    """Return the places and the mask of the scales of piece `k`."""
    start = (block * PIECES + k) * GROUPS
    groups = tl.arange(0, GROUPS)
    return row * groups_a_row + start + groups, groups < tl.minimum(groups_a_row - start, GROUPS).to(tl.int32)


@triton.jit
def _load_scales(ptr, row, block, groups_a_row, GROUPS: tl.constexpr, PIECES: tl.constexpr):
    scales = ()
    for k in tl.static_range(PIECES):
        at, mask = _scale_place(row, block, groups_a_row, k, GROUPS, PIECES)
        scales += (tl.load(ptr + at, mask=mask, other=0.0),)
    return scales


@triton.jit(do_not_specialize=["n_cols", "blocks_a_row", "codes_a_row"])
def forward_codes_kernel(
    x_ptr,
    y_ptr,
    codes_ptr,
    n_cols,
    blocks_a_row,
    codes_a_row,
    x_stride,
    y_stride,
    codes_stride,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    BOUNDS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Compute `y = activation(x)` and the codes of the derivative."""
    row = (tl.program_id(0) // blocks_a_row).to(tl.int64)
    block = (tl.program_id(0) % blocks_a_row).to(tl.int64)
    CODES: tl.constexpr = VECTOR * BITS // 8 if VECTOR * BITS >= 8 else 1
    x = _load_pieces(x_ptr, row, block, n_cols, x_stride, GROUPS, GROUP, PIECES, VECTOR)
    for k in tl.static_range(PIECES):
        wide = x[k].to(tl.float32)
        _store_piece(y_ptr, value(wide, KIND), row, block, n_cols, y_stride, k, PIECES, VECTOR)
        code = encode_slope(times_slope(tl.full(wide.shape, 1.0, tl.float32), wide, KIND), BOUNDS, BITS)
        if VECTOR * BITS < 8:
            # The last byte of a row may hold fewer columns than it has room for.
            code = tl.where(_place(block, n_cols, k, GROUPS, GROUP, PIECES, VECTOR)[2], code, 0)
        _store_piece(codes_ptr, pack(code, BITS), row, block, codes_a_row, codes_stride, k, PIECES, CODES)


@triton.jit(do_not_specialize=["n_cols", "blocks_a_row", "codes_a_row"])
def backward_codes_kernel(
    dy_ptr,
    dx_ptr,
    codes_ptr,
    n_cols,
    blocks_a_row,
    codes_a_row,
    dy_stride,
    dx_stride,
    codes_stride,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Compute dx from the codes of the derivative."""
    row = (tl.program_id(0) // blocks_a_row).to(tl.int64)
    block = (tl.program_id(0) % blocks_a_row).to(tl.int64)
    CODES: tl.constexpr = VECTOR * BITS // 8 if VECTOR * BITS >= 8 else 1
    dy = _load_pieces(dy_ptr, row, block, n_cols, dy_stride, GROUPS, GROUP, PIECES, VECTOR)
    codes = _load_pieces(codes_ptr, row, block, codes_a_row, codes_stride, GROUPS, GROUP * BITS // 8, PIECES, CODES)
    for k in tl.static_range(PIECES):
        slope = decode_slope(unpack(codes[k], BITS), LEVELS, BITS)
        dx = times_decoded(dy[k].to(tl.float32), slope, KIND)
        _store_piece(dx_ptr, dx, row, block, n_cols, dx_stride, k, PIECES, VECTOR)


@triton.jit(do_not_specialize=["n_cols", "blocks_a_row", "codes_a_row", "groups_a_row"])
def forward_gated_codes_kernel(
    gate_ptr,
    up_ptr,
    y_ptr,
    value_ptr,
    slope_ptr,
    value_scale_ptr,
    slope_scale_ptr,
    n_cols,
    blocks_a_row,
    codes_a_row,
    groups_a_row,
    gate_stride,
    up_stride,
    y_stride,
    codes_stride,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Compute `y = activation(gate) * up` and the codes of the factors of both gradients."""
    row = (tl.program_id(0) // blocks_a_row).to(tl.int64)
    block = (tl.program_id(0) % blocks_a_row).to(tl.int64)
    CODES: tl.constexpr = VECTOR * BITS // 8 if VECTOR * BITS >= 8 else 1
    gate = _load_pieces(gate_ptr, row, block, n_cols, gate_stride, GROUPS, GROUP, PIECES, VECTOR)
    up = _load_pieces(up_ptr, row, block, n_cols, up_stride, GROUPS, GROUP, PIECES, VECTOR)
    for k in tl.static_range(PIECES):
        _, _, mask = _place(block, n_cols, k, GROUPS, GROUP, PIECES, VECTOR)
        wide, wide_up = gate[k].to(tl.float32), up[k].to(tl.float32)
        activated = value(wide, KIND)
        _store_piece(y_ptr, activated * wide_up, row, block, n_cols, y_stride, k, PIECES, VECTOR)
        at, in_groups = _scale_place(row, block, groups_a_row, k, GROUPS, PIECES)
        codes, scale = symmetric(activated, mask, BITS)
        _store_piece(value_ptr, codes, row, block, codes_a_row, codes_stride, k, PIECES, CODES)
        tl.store(value_scale_ptr + at, scale, mask=in_groups)
        codes, scale = symmetric(times_slope(wide_up, wide, KIND), mask, BITS)
        _store_piece(slope_ptr, codes, row, block, codes_a_row, codes_stride, k, PIECES, CODES)
        tl.store(slope_scale_ptr + at, scale, mask=in_groups)


@triton.jit(do_not_specialize=["n_cols", "blocks_a_row", "codes_a_row", "groups_a_row"])
def backward_gated_codes_kernel(
    dy_ptr,
    dgate_ptr,
    dup_ptr,
    value_ptr,
    slope_ptr,
    value_scale_ptr,
    slope_scale_ptr,
    n_cols,
    blocks_a_row,
    codes_a_row,
    groups_a_row,
    dy_stride,
    dgate_stride,
    dup_stride,
    codes_stride,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    PIECES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Compute the requested gradients of gate and up from the codes of their factors."""
    row = (tl.program_id(0) // blocks_a_row).to(tl.int64)
    block = (tl.program_id(0) % blocks_a_row).to(tl.int64)
    CODES: tl.constexpr = VECTOR * BITS // 8 if VECTOR * BITS >= 8 else 1
    WIDTH: tl.constexpr = GROUP * BITS // 8
    dy = _load_pieces(dy_ptr, row, block, n_cols, dy_stride, GROUPS, GROUP, PIECES, VECTOR)
    if dgate_ptr is not None:
        slope = _load_pieces(slope_ptr, row, block, codes_a_row, codes_stride, GROUPS, WIDTH, PIECES, CODES)
        slope_scale = _load_scales(slope_scale_ptr, row, block, groups_a_row, GROUPS, PIECES)
    if dup_ptr is not None:
        values = _load_pieces(value_ptr, row, block, codes_a_row, codes_stride, GROUPS, WIDTH, PIECES, CODES)
        value_scale = _load_scales(value_scale_ptr, row, block, groups_a_row, GROUPS, PIECES)
    for k in tl.static_range(PIECES):
        wide = dy[k].to(tl.float32)
        if dgate_ptr is not None:
            dgate = wide * decode_symmetric(slope[k], slope_scale[k], BITS)
            _store_piece(dgate_ptr, dgate, row, block, n_cols, dgate_stride, k, PIECES, VECTOR)
        if dup_ptr is not None:
            dup = wide * decode_symmetric(values[k], value_scale[k], BITS)
            _store_piece(dup_ptr, dup, row, block, n_cols, dup_stride, k, PIECES, VECTOR)

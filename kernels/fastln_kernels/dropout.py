"""Dropout's random numbers in Triton; `reference.dropout_keep` defines which number belongs to which element.

No mask is stored: the number of an element is a function of seed, row and column, so the backward draws it again.
"""

# mypy: allow-untyped-defs
import triton
import triton.language as tl


@triton.jit
def random_16_bits(seed, rows, first_col, N_ROWS: tl.constexpr, N_COLS: tl.constexpr):
    """Return `(N_ROWS, N_COLS)` numbers below 2^16 for `rows` (int64) and the columns from `first_col` on.

    `first_col` and `N_COLS` are multiples of 8.
    """
    GROUPS: tl.constexpr = N_COLS // 8
    shape: tl.constexpr = (N_ROWS, GROUPS)
    groups = tl.broadcast_to((tl.arange(0, GROUPS) + first_col // 8)[None, :], shape).to(tl.uint32)
    low = tl.broadcast_to(rows.to(tl.uint32)[:, None], shape)
    high = tl.broadcast_to((rows >> 32).to(tl.uint32)[:, None], shape)
    w0, w1, w2, w3 = tl.philox(seed, groups, low, high, tl.zeros(shape, tl.uint32))
    # The last of the joined dimensions runs fastest: low or high half, then odd or even word, then first or last two.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    numbers = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(numbers, (N_ROWS, GROUPS * 8))


@triton.jit
def dropped_out(x, seed, rows, first_col, THRESHOLD: tl.constexpr):
    """Return the float32 tile `x`, whose rows and first column are given, with dropout applied."""
    N_ROWS: tl.constexpr = x.shape[0]
    N_COLS: tl.constexpr = x.shape[1]
    numbers = random_16_bits(seed, rows, first_col, N_ROWS, N_COLS)
    scale: tl.constexpr = 65536 / (65536 - THRESHOLD)
    return tl.where(numbers >= THRESHOLD, x * scale, 0.0)

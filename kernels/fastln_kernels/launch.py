"""Launch choices, separate from the kernels: the tile of one program, its warps, and the number of programs.

A lane loads 16 bytes at once, so a warp requests 512 bytes of a row with each load. "Sums" are the sums over rows for
dweight and dbias. A "prologue" is dropout or a residual before the norm. `scripts/compile_report.py` shows the
registers and spills of the compiled kernels.

Piece of a row: the narrowest that leaves each lane few enough elements.
    In bf16, 384 = 3 x 128, 768 = 3 x 256, and 1,152 = 5 x 256 less half a piece. Up to 1,280 columns, a row belongs to
    one warp or half a warp, so its sums need no barrier.

Elements per lane: 40; 32 with sums in float32. With sums, and if at most 8 warps hold the row, 24 after a prologue, on
AMD and on Blackwell.
    Sums of dweight and dbias take 80 of 255 registers, the weight 40, two packed rows 40 (float32: 64). On AMD and
    Blackwell the same code takes more registers, and dropout's random numbers need some. Rows too wide for 8 warps at
    24 elements use the larger number.

Elements per lane with 16 warps: forward 64, dx 32. After a prologue, on AMD and on Blackwell: forward 32, dx 24 (on
Blackwell 32 without a prologue). Sums 32, only without dx and dresidual.
    512 threads have 128 registers each; 64 elements of 16 bits take 32. With sums, one row fits only in 16 bits and
    without dx and dresidual. These are the largest numbers at which nothing spills. Wider rows use blocks of columns.

Blocks of columns: 8 warps, one program per SM, 255 registers per lane.
    The current rows stay in the L2 cache between their sums and their results. With 8 warps a lane has twice as many
    registers as with 16, but it holds the addresses only once. That leaves more registers for sums.

Blocks requested at once: 8 of each of two tensors, or 16 of one: 64 KB. 4 of each of two tensors if there are sums (on
AMD always) and the elements have 16 bits or there is a prologue. 8 of one whose x_hat is written in 8 bits: 16 spill.
    A Blackwell SM needs 32 KB in flight, and more if it reads twice: 54 KB for dx. In 16 bits, a float32 weight takes
    as many registers as both tensors. AMD's blocks are twice as wide.

Sums kept in registers: 128 registers per lane; 64 after a prologue or on AMD; 32 for both.
    Enough for both dweight and dbias up to 16,384 columns, or for one of them up to 32,768 (the same on AMD, where a
    block is twice as wide). Dropout's random numbers need some. Other sums have their own kernel.

Rows of a tile: as many as the warps hold at once.
    At 384 and 768 columns (bf16) that is 1.5 KB per warp and input. The forward's 32 warps per SM request 48 KB.

Warps of a program: 4; 8 if it keeps sums.
    The 8 warps share one row of partial sums.

Programs that keep sums: 8 warps per SM.
    An H100's SM needs 15 KB in flight: 8 warps x 2 inputs x 1.5 KB = 24 KB. More programs cost more rows of partial
    sums.

Prefetch of the next tile: if sums, weight, two tiles of every input and dx, where it is rounded to 8 bits, take at most
200 registers; 160 after a prologue or if warps share a row; 40 less on AMD and Blackwell.
    Without it no load is in flight while 8 warps compute. The limits come from compiled code: with dropout's random
    numbers, or with warps that share a row, ptxas has too few registers for the rest beyond 160.

Elementwise block: 2 x 16 bytes per lane of each tensor, 4 warps.
    Each lane has two loads in flight per input, and 16 elements (bf16) share the index arithmetic.

Cap on registers (NVIDIA): 255 with sums; forward 80, 128 above 24 elements, 168 above 32.
    With sums, the one program on an SM has all registers. The forward runs 24 warps per SM at 80 registers, 16 at 128
    and 12 at 168, which request at least 30 KB. Without a cap, ptxas spills a few registers to fit more programs.
    A result that is rounded to 8 bits too stays in float32 until its row's largest element is known: the next larger
    cap, 255 above 168.

Tiles of products in 8 bits: 128 x 128, 8 warps. On Hopper 128 x 256 forward (float32 results would spill) and 256 x 128
backward. On AMD 128 x 128, 4 warps, forward and 128 x 256 backward. 64 x 128, 4 warps, if there were fewer tiles than
SMs, and to turn on AMD.
    On Hopper four warps share an instruction of 64 x 128, so a larger tile has fewer other instructions per product.
    The backward's weight must be transposed on its way into the matrix units, byte by byte: its tile is higher, so that
    more rows share that work. These are the largest at which nothing spills on sm_100, and on AMD those whose results
    fit into the 64 KB of shared memory through which turned blocks go.

A norm made again: tiles of 128 columns and as many rows as leave each lane 16 bytes of the result, 4 below each other.
    A tile's loads of codes are 8 bytes per lane; four are in flight at once, and share the weight.

Column tile: 16 rows x 128 columns, 4 warps; 32 warps per SM.
    128 divides the usual widths. Each row's piece is whole 128-byte lines. Each program's sums cover only 128 columns.

Tile of the last sum: 512 rows x 8 columns, 4 warps.
    There are more rows than SMs, so all partial sums are requested at once. 8 columns make 96 programs for 768 columns.
"""

import contextlib
import functools
from dataclasses import dataclass, replace

import torch

LANES = 64 if torch.version.hip else 32
"""Lanes per warp."""

_NARROWEST = 16  # fewest lanes that share a row, if the row is long enough
_MAX_WARPS = 16
_WIDE_WARPS = 8
_SUMMING_WARPS_PER_SM = 8
_COLUMN_WARPS_PER_SM = 32
_SMS_WITHOUT_GPU = 2  # so few that every program loops, as on a GPU


@dataclass(frozen=True, slots=True)
class RowTile:
    """A tile of whole rows, which one program processes at a time.

    Attributes:
        rows: Rows in the tile.
        piece: Columns in a piece of a row, a power of two.
        pieces: Pieces in a row; the last may be partly empty.
        warps: Warps that share the tile.
        max_registers: Maximum number of registers per lane; None leaves it to the compiler.
    """

    rows: int
    piece: int
    pieces: int
    warps: int
    max_registers: int | None = None


@dataclass(frozen=True, slots=True)
class BackwardTile(RowTile):
    """A tile of whole rows for the backward.

    Attributes:
        prefetch: Whether a program requests its next tile before it computes the current one.
    """

    prefetch: bool = False


@dataclass(frozen=True, slots=True)
class ColumnTile:
    """A tile of some columns of some rows, which one program processes at a time.

    Attributes:
        rows: Rows in the tile.
        cols: Columns in the tile, a power of two.
        warps: Warps that share it.
    """

    rows: int
    cols: int
    warps: int


@dataclass(frozen=True, slots=True)
class WideTile:
    """How one program processes a row in blocks of columns.

    Attributes:
        cols: Columns in a block, a power of two.
        group: Blocks that are requested at once.
        sums: How many sums over rows (dweight, dbias) the program keeps.
        warps: Warps that share a block.
        max_registers: Maximum number of registers per lane; None leaves it to the compiler.
    """

    cols: int
    group: int
    sums: int
    warps: int
    max_registers: int | None


COLUMN_TILE = ColumnTile(rows=16, cols=128, warps=4)
"""For sums over rows, restricted to some columns."""

FINISH_TILE = ColumnTile(rows=512, cols=8, warps=4)
"""For the last sum, which adds the programs' partial sums."""


AGAIN_REPEATS = 4
"""Tiles below each other of a program that makes a norm's result again; they share the loads of weight and bias."""


def again_tile(n_cols: int, itemsize: int) -> ColumnTile:
    """Return the tile of a program that makes a norm's result again.

    Args:
        n_cols: Columns in a row.
        itemsize: Bytes per element of the result.
    """
    cols, warps = min(_power_of_two(n_cols), 128), 4
    return ColumnTile(rows=16 // itemsize * LANES * warps // cols, cols=cols, warps=warps)


def elementwise_block(itemsize: int) -> ColumnTile:
    """Return the block of neighbouring elements for one program of an operation without sums.

    Args:
        itemsize: Bytes per element.
    """
    return ColumnTile(rows=1, cols=2 * (16 // itemsize) * LANES * 4, warps=4)


def forward_tile(
    n_cols: int, itemsize: int, device: torch.device, *, prologue: bool, rounds: bool = False
) -> RowTile | None:
    """Return the forward's tile of whole rows, or None if the registers cannot hold such rows.

    Args:
        n_cols: Columns in a row.
        itemsize: Bytes per element.
        device: Where the kernel will run.
        prologue: Whether dropout or a residual comes before the norm.
        rounds: Whether the result is rounded to 8 bits too.
    """
    tile = _row_tile(n_cols, itemsize, LANES, 4, 40, 40, 32 if prologue or is_tight(device) else 64)
    if tile is None:
        return None
    elements = tile.pieces * 16 // itemsize
    registers = 80 if elements <= 24 else 128 if elements <= 32 else 168
    if rounds:
        registers = {80: 128, 128: 168, 168: 255}[registers]
    return replace(tile, max_registers=_capped(min(registers, 65536 // LANES // tile.warps)))


def backward_tile(
    n_cols: int,
    itemsize: int,
    device: torch.device,
    *,
    n_inputs: int,
    n_sums: int,
    need_rows: bool,
    prologue: bool,
    rounds: bool = False,
) -> BackwardTile | None:
    """Return the backward's tile of whole rows, or None if the registers cannot hold all that is requested.

    Args:
        n_cols: Columns in a row.
        itemsize: Bytes per element.
        device: Where the kernel will run.
        n_inputs: How many tensors of rows are read.
        n_sums: How many sums over rows (dweight, dbias) the programs keep.
        need_rows: Whether to compute gradients of rows (dx, dresidual).
        prologue: Whether dropout or a residual came before the norm.
        rounds: Whether dx is rounded to 8 bits too.
    """
    if not n_sums:
        tile = _row_tile(n_cols, itemsize, LANES, 4, 40, 40, 24 if prologue or LANES == 64 else 32)
        return BackwardTile(tile.rows, tile.piece, tile.pieces, tile.warps) if tile else None
    tight = is_tight(device)
    limit = 40 if itemsize == 2 else 32
    if prologue and tight and (itemsize == 4 or LANES == 64):
        limit = 24
    widest = 32 if itemsize == 2 and not need_rows and LANES == 32 else 0
    tile = _row_tile(n_cols, itemsize, LANES, 8, 24 if tight or prologue else limit, limit, widest)
    if tile is None:
        return None
    elements = tile.pieces * 16 // itemsize
    registers = elements * (n_sums + need_rows + rounds) + 2 * n_inputs * elements * itemsize // 4
    roomy = tile.warps < _MAX_WARPS
    budget = (200 if tile.rows >= tile.warps and not prologue else 160) - (40 if tight else 0)
    return BackwardTile(
        tile.rows,
        tile.piece,
        tile.pieces,
        tile.warps,
        _capped(255) if roomy else None,
        prefetch=roomy and registers <= budget,
    )


def wide_tile(
    n_cols: int, itemsize: int, *, n_inputs: int, n_sums: int, prologue: bool, codes: bool = False
) -> WideTile:
    """Return how a program processes rows that no `RowTile` can hold.

    Args:
        n_cols: Columns in a row.
        itemsize: Bytes per element.
        n_inputs: How many tensors of rows are read for a row's sums.
        n_sums: How many sums over rows (dweight, dbias) are requested.
        prologue: Whether dropout or a residual comes before the norm.
        codes: Whether x_hat is written in 8 bits.
    """
    cols = 16 // itemsize * LANES * _WIDE_WARPS
    blocks = -(-n_cols // cols)
    elements = blocks * 16 // itemsize
    sums = min((128 >> (prologue + (LANES == 64))) // elements, n_sums)
    crowded = (sums or LANES == 64) and (prologue or itemsize == 2)
    group = 16 if n_inputs == 1 and not codes else 4 if crowded else 8
    return WideTile(cols, min(group, blocks), sums, _WIDE_WARPS, _capped(255))


@functools.cache
def _row_tile(
    n_cols: int, itemsize: int, lanes: int, warps: int, preferred: int, limit: int, widest: int
) -> RowTile | None:
    """Return a tile for `warps` warps, or for as many warps as must share a row.

    A lane holds up to `preferred` elements of a row, up to `limit` if half the maximum number of warps share the row,
    and up to `widest` if the maximum number shares it.
    """
    vector = 16 // itemsize
    piece = max(min(_power_of_two(n_cols), _NARROWEST * vector), 8)  # 8 columns share a call of dropout's generator
    half = _MAX_WARPS // 2 * lanes * vector
    while -(-n_cols // piece) * vector > (preferred if piece < half else limit) and piece < 2 * half:
        piece *= 2
    lanes_a_row, pieces = max(piece // vector, 1), -(-n_cols // piece)
    warps = max(warps, lanes_a_row // lanes)
    if pieces * vector > (widest if warps == _MAX_WARPS else limit):
        return None
    return RowTile(rows=max(warps * lanes // lanes_a_row, 1), piece=piece, pieces=pieces, warps=warps)


def _capped(registers: int) -> int | None:
    """Return a cap for NVIDIA's compiler, which without one may spill to fit more programs into an SM."""
    return registers if LANES == 32 else None


def summing_programs(device: torch.device, tile: RowTile | ColumnTile) -> int:
    """Return how many programs to start if each has its own partial sums: just enough to keep every SM busy.

    Args:
        device: Where the kernel will run.
        tile: The tile that each program processes at a time.
    """
    warps = _SUMMING_WARPS_PER_SM if isinstance(tile, RowTile) else _COLUMN_WARPS_PER_SM
    return sm_count(device) * max(warps // tile.warps, 1)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def sm_count(device: torch.device) -> int:
    """Return the number of streaming multiprocessors of a device; 2 on a CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return _SMS_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the current device. Triton launches on the current device, not on the tensors' device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def is_tight(device: torch.device) -> bool:
    """Whether the same code takes more registers: on AMD, and on NVIDIA from Blackwell on, which pairs registers."""
    if device.type != "cuda":
        return False
    return LANES == 64 or torch.cuda.get_device_capability(device)[0] >= 10


@dataclass(frozen=True, slots=True)
class ProductTile:
    """A tile of a product, which one program computes.

    Attributes:
        rows: Rows of the tile.
        cols: Columns of the tile; blocks of 64 of them can be turned back.
        inner: Summands taken at once.
        group: Tiles of rows that share a tile of the weight before it leaves the cache.
        warps: Warps that share the tile.
        stages: Loads that are in flight at once, each of `inner` summands.
    """

    rows: int
    cols: int
    inner: int
    group: int
    warps: int
    stages: int


def quantise_tile(n_cols: int, itemsize: int, device: torch.device, *, wider: bool) -> RowTile | None:
    """Return the tile of whole rows that are rounded to 8 bits, or None if the registers cannot hold such rows.

    Args:
        n_cols: Columns in a row.
        itemsize: Bytes per element.
        device: Where the kernel will run.
        wider: Whether factors or turning make the elements float32.
    """
    return forward_tile(n_cols, itemsize, device, prologue=wider)


def activation_tile(
    n_cols: int, itemsize: int, device: torch.device, *, n_inputs: int, codes: bool = False
) -> RowTile | None:
    """Return the tile of whole rows of an activation whose results are rounded to 8 bits, or None if none holds them.

    Args:
        n_cols: Columns in a row.
        itemsize: Bytes per element.
        device: Where the kernel will run.
        n_inputs: How many tensors of rows are read.
        codes: Whether codes are written or read. With 16 warps, which have 128 registers per lane, these spill.
    """
    tile = _row_tile(n_cols, itemsize, LANES, 4, 32, 32, 0 if codes else 32 if n_inputs < 3 else 24)
    return None if tile is None else replace(tile, max_registers=_capped(min(168, 65536 // LANES // tile.warps)))


def wide_quantise_options(itemsize: int) -> dict[str, int | bool]:
    """Return what the kernel is told that rounds rows to 8 bits which no `RowTile` can hold: its block of columns.

    Args:
        itemsize: Bytes per element.
    """
    cap = {} if (registers := _capped(128)) is None else {"maxnreg": registers}
    cols = 2 * (16 // itemsize) * LANES * _WIDE_WARPS
    return {"COLS": cols, **cap, "num_warps": _WIDE_WARPS, "enable_fp_fusion": True}


def product_tile(
    n_rows: int, n_cols: int, itemsize: int, device: torch.device, *, backward: bool, turned: bool, adds: bool = False
) -> ProductTile:
    """Return the tile of a product of 8-bit rows and weights: the largest of which every SM has one.

    Args:
        n_rows: Rows of the result.
        n_cols: Columns of the result.
        itemsize: Bytes per element of the result.
        device: Where the kernel will run.
        backward: Whether the sum runs along the weight's columns.
        turned: Whether the result is turned back.
        adds: Whether a tensor in float32 is added, which takes as many registers as the sums.
    """
    if LANES == 64:
        large = ProductTile(128, 256, 64, 8, 8, 3) if backward else ProductTile(128, 128, 64, 8, 4, 3)
        tiles = (large, ProductTile(64, 128, 128, 8, 4, 3))[turned:]
    else:
        tiles = (ProductTile(128, 128, 128, 8, 8, 3), ProductTile(64, 128, 128, 8, 4, 3))
        if is_hopper(device) and (backward or (itemsize < 4 and not adds)):
            tiles = (ProductTile(*((256, 128) if backward else (128, 256)), 128, 8, 8, 3), *tiles)
    sms = sm_count(device)
    enough = (tile for tile in tiles if -(-n_rows // tile.rows) * -(-n_cols // tile.cols) >= sms)
    return next(enough, tiles[-1])


def row_options(tile: RowTile) -> dict[str, int | bool]:
    """Return what a kernel is told about its tile of rows.

    `enable_fp_fusion` (contraction of a * b + c) is set explicitly, because Triton is about to change its default, and
    that would change results.
    """
    sizes = {"ROWS": tile.rows, "PIECE": tile.piece, "PIECES": tile.pieces}
    cap = {} if tile.max_registers is None else {"maxnreg": tile.max_registers}
    return {**sizes, **cap, "num_warps": tile.warps, "enable_fp_fusion": True}


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether warps share matrix instructions in groups of four (wgmma)."""
    return LANES == 32 and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9

"""Launch choices, apart from the kernels: how much of a tensor one program takes, with how many warps, and how many.

A lane loads 16 bytes at once, so a warp asks for 512 bytes of a row with each load.

| choice                   | value                      | why                                                        |
|--------------------------|----------------------------|------------------------------------------------------------|
| piece of a row           | the narrowest that leaves  | 384 = 3 x 128, 768 = 3 x 256, 1,152 = 5 x 256 less half a  |
|                          | a lane few enough elements | piece (bf16). Up to 1,280 columns a row belongs to one     |
|                          |                            | warp or half of one: its sums need no barrier              |
| elements a lane          | 40; with sums 32 in        | sums of dweight and dbias take 80 registers of 255, the    |
|                          | float32; with sums, 24     | weight 40, two packed rows 40 (float32: 64): no spills. On |
|                          | after a prologue, on AMD   | AMD and Blackwell the same code takes more registers, and  |
|                          | and on Blackwell while 8   | dropout's numbers need some; rows wider than 8 warps hold  |
|                          | warps hold the row         | so take the larger number                                  |
| ... of 16 warps          | forward 64, dx 32; sums 32 | 512 threads have 128 registers each, so of the sums only   |
|                          | in 16 bits, of dweight and | those fit: dweight and dbias 64 and two packed rows 32, or |
|                          | dbias without rows or of   | dweight 32 beside the rows, whose weight is loaded again   |
|                          | RMSNorm's dweight          | in each turn. Wider rows: loops over blocks of columns     |
| rows of a tile           | what the warps hold, once  | 1.5 KB a warp and input at 384 and 768 (bf16): the         |
|                          |                            | forward's 32 warps an SM ask for 48 KB                     |
| warps of a program       | 4; 8 that keep sums        | those 8 share one row of partial sums                      |
| programs that keep sums  | 8 warps an SM              | an H100's SM wants 15 KB asked for: 8 warps x 2 inputs x   |
|                          |                            | 1.5 KB = 24 KB; more programs cost rows of partial sums    |
| next tile asked for      | where sums, weight and two | otherwise nothing is on its way while 8 warps compute. By  |
| before this one is       | tiles of every input take  | what compiles: dropout's numbers, or warps that share a    |
| computed                 | 200 registers; 160 after a | row, leave ptxas too little for the rest beyond 160; 40    |
|                          | prologue or where warps    | less on AMD and Blackwell                                  |
|                          | share a row                |                                                            |
| elementwise block        | 2 x 16 bytes a lane of     | every lane has two loads under way for each input, and the |
|                          | each tensor, 4 warps       | index arithmetic is shared by 16 elements (bf16)           |
| cap on registers         | 255 with sums; forward 80, | one program an SM has them all; the forward's 24 warps an  |
| (NVIDIA)                 | 128 beyond 24 elements,    | SM at 80, 16 at 128, 12 at 168, ask for 30 KB and more.    |
|                          | 168 beyond 32              | Without a cap ptxas spills a few to fit more               |
| column tile              | 16 rows x 128 columns, 4   | 128 divides the usual widths; a row's piece is whole       |
|                          | warps; 32 warps an SM      | 128-byte lines; each program's sums are 128 columns only   |
"""

import contextlib
import functools
from dataclasses import dataclass, replace

import torch

LANES = 64 if torch.version.hip else 32
"""Lanes of a warp."""

_NARROWEST = 16  # lanes that share a row, where the row is long enough
_MAX_WARPS = 16
_SUMMING_WARPS_PER_SM = 8
_COLUMN_WARPS_PER_SM = 32
_SMS_WITHOUT_GPU = 2  # few enough that every program loops, as on a GPU


@dataclass(frozen=True, slots=True)
class RowTile:
    """Whole rows, which one program takes at a time.

    Attributes:
        rows: Rows of the tile.
        piece: Columns of a piece of a row, a power of two.
        pieces: Pieces of a row; the last may be part empty.
        warps: Warps that share the tile.
        max_registers: How many a lane may have; None leaves it to the compiler.
    """

    rows: int
    piece: int
    pieces: int
    warps: int
    max_registers: int | None = None


@dataclass(frozen=True, slots=True)
class BackwardTile(RowTile):
    """Likewise, for the backward.

    Attributes:
        prefetch: Whether a program asks for its next tile before it computes the one at hand.
        keep_weight: Whether the weight stays in the registers, rather than being loaded for each tile.
    """

    prefetch: bool = False
    keep_weight: bool = True


@dataclass(frozen=True, slots=True)
class ColumnTile:
    """Some columns of some rows, which one program takes at a time.

    Attributes:
        rows: Rows of the tile.
        cols: Columns of the tile, a power of two.
        warps: Warps that share it.
    """

    rows: int
    cols: int
    warps: int


COLUMN_TILE = ColumnTile(rows=16, cols=128, warps=4)
"""For sums over rows of a piece of the columns."""

FINISH_TILE = ColumnTile(rows=32, cols=32, warps=4)
"""For the last sum, over the programs' partial sums: narrow, so that a short vector still makes many programs."""

WIDE_BLOCK = ColumnTile(rows=1, cols=4096, warps=16)
"""For rows that no `RowTile` holds: one block of a row's columns."""


def elementwise_block(itemsize: int) -> ColumnTile:
    """The block of neighbouring elements that one program takes in an operation without sums.

    Args:
        itemsize: Bytes of an element.
    """
    return ColumnTile(rows=1, cols=2 * (16 // itemsize) * LANES * 4, warps=4)


def forward_tile(n_cols: int, itemsize: int) -> RowTile | None:
    """The forward's tile of whole rows, or None for rows that the registers cannot hold.

    Args:
        n_cols: Columns of a row.
        itemsize: Bytes of an element.
    """
    tile = _row_tile(n_cols, itemsize, LANES, 4, 40, 40, 64)
    if tile is None:
        return None
    elements = tile.pieces * 16 // itemsize
    registers = 80 if elements <= 24 else 128 if elements <= 32 else 168
    return replace(tile, max_registers=_capped(min(registers, 65536 // LANES // tile.warps)))


def backward_tile(
    n_cols: int,
    itemsize: int,
    device: torch.device,
    *,
    n_inputs: int,
    n_sums: int,
    need_rows: bool,
    centre: bool,
    prologue: bool,
) -> BackwardTile | None:
    """The backward's tile of whole rows, or None where the registers cannot hold what is asked for.

    Args:
        n_cols: Columns of a row.
        itemsize: Bytes of an element.
        device: Where the kernel will run.
        n_inputs: How many tensors of rows are read.
        n_sums: How many sums over rows (of dweight, of dbias) the programs keep.
        need_rows: Whether gradients of rows are made.
        centre: Whether the mean was subtracted.
        prologue: Whether dropout or a residual came before the norm.
    """
    if not n_sums:
        tile = _row_tile(n_cols, itemsize, LANES, 4, 40, 40, 24 if prologue else 32)
        return BackwardTile(tile.rows, tile.piece, tile.pieces, tile.warps) if tile else None
    fits = not need_rows or (n_sums == 1 and not centre and not prologue)
    tight = is_tight(device)
    limit, widest = (40, 32 if fits else 0) if itemsize == 2 else (24 if tight and prologue else 32, 0)
    tile = _row_tile(n_cols, itemsize, LANES, 8, 24 if tight or prologue else limit, limit, widest)
    if tile is None:
        return None
    elements = tile.pieces * 16 // itemsize
    registers = elements * (n_sums + need_rows) + 2 * n_inputs * elements * itemsize // 4
    roomy = tile.warps < _MAX_WARPS
    budget = (200 if tile.rows >= tile.warps and not prologue else 160) - (40 if tight else 0)
    return BackwardTile(
        *(tile.rows, tile.piece, tile.pieces, tile.warps, _capped(255) if roomy else None),
        prefetch=roomy and registers <= budget,
        keep_weight=roomy,
    )


@functools.cache
def _row_tile(
    n_cols: int, itemsize: int, lanes: int, warps: int, preferred: int, limit: int, widest: int
) -> RowTile | None:
    """A tile of `warps` warps, or of as many as must share a row.

    A lane holds up to `preferred` elements of a row; up to `limit` where it is one of half the most warps, and up to
    `widest` where it is one of the most.
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
    """A cap for NVIDIA's compiler, which left to itself may spill to fit more programs into an SM."""
    return registers if LANES == 32 else None


def summing_programs(device: torch.device, tile: RowTile | ColumnTile) -> int:
    """How many programs with partial sums of their own to start, so that each SM is busy and no more.

    Args:
        device: Where the kernel will run.
        tile: What each of them takes at a time.
    """
    warps = _SUMMING_WARPS_PER_SM if isinstance(tile, RowTile) else _COLUMN_WARPS_PER_SM
    return sm_count(device) * max(warps // tile.warps, 1)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


@functools.cache
def sm_count(device: torch.device) -> int:
    """How many streaming multiprocessors a device has; two on a CPU, where kernels are interpreted."""
    if device.type != "cuda":
        return _SMS_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a GPU the current one, on which Triton launches whichever GPU the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def is_tight(device: torch.device) -> bool:
    """Whether the same code takes more registers: AMD's compiler, and NVIDIA's from Blackwell on, which pairs them."""
    if device.type != "cuda":
        return False
    return LANES == 64 or torch.cuda.get_device_capability(device)[0] >= 10

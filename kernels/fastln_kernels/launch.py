"""Launch choices, apart from the kernels: how much of a tensor one program takes, with how many warps, and how many.

A lane loads 16 bytes at once, so a warp asks for 512 bytes of a row with each load.

| choice                   | value                      | why                                                        |
|--------------------------|----------------------------|------------------------------------------------------------|
| piece of a row           | the narrowest that leaves  | 384 = 3 x 128, 768 = 3 x 256, 1,152 = 5 x 256 less half a  |
|                          | a lane few enough elements | piece (bf16). Up to 1,280 columns a row belongs to one     |
|                          |                            | warp or half of one: its sums need no barrier              |
| elements a lane          | 40 of 16 bits, 32 of 32    | sums of dweight and dbias take 80 registers of 255, the    |
|                          |                            | weight 40, three packed rows 60 (float32: 96): no spills   |
| ... of 16 warps          | forward 64, dx 32, sums 0  | 512 threads have 128 registers each: wider rows go through |
|                          |                            | kernels that loop over blocks of columns                   |
| rows of a tile           | what the warps hold, once  | 1.5 KB a warp and input at 384 and 768 (bf16): the         |
|                          |                            | forward's 32 warps an SM ask for 48 KB                     |
| warps of a program       | 4; 8 that keep sums        | those 8 share one row of partial sums                      |
| programs that keep sums  | 8 warps an SM              | an H100's SM wants 15 KB asked for: 8 warps x 2 inputs x   |
|                          |                            | 1.5 KB = 24 KB; more programs cost rows of partial sums    |
| elementwise block        | 2 x 16 bytes a lane of     | every lane has two loads under way for each input, and the |
|                          | each tensor, 4 warps       | index arithmetic is shared by 16 elements (bf16)           |
| column tile              | 16 rows x 128 columns, 4   | 128 divides the usual widths; a row's piece is whole       |
|                          | warps; 32 warps an SM      | 128-byte lines; each program's sums are 128 columns only   |
"""

import contextlib
import functools
from dataclasses import dataclass

import torch

LANES = 64 if torch.version.hip else 32
"""Lanes of a warp."""

_NARROWEST = 16  # lanes that share a row, where the row is long enough
_MAX_WARPS = 16
_ELEMENTS = {2: 40, 4: 32}  # of a row that a lane holds, by bytes of an element
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
    """

    rows: int
    piece: int
    pieces: int
    warps: int


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


def row_tile(n_cols: int, itemsize: int, *, backward: bool, sums: bool = False) -> RowTile | None:
    """The tile of whole rows, or None for rows that the registers cannot hold.

    Args:
        n_cols: Columns of a row.
        itemsize: Bytes of an element.
        backward: Whether the tile is for the backward.
        sums: Whether the programs keep sums over rows.
    """
    return _row_tile(n_cols, itemsize, LANES, backward, sums)


@functools.cache
def _row_tile(n_cols: int, itemsize: int, lanes: int, backward: bool, sums: bool) -> RowTile | None:
    vector, limit = 16 // itemsize, _ELEMENTS[itemsize]
    piece = max(min(_power_of_two(n_cols), _NARROWEST * vector), 8)  # 8 columns share a call of dropout's generator
    while -(-n_cols // piece) * vector > limit and piece < _MAX_WARPS * lanes * vector:
        piece *= 2
    lanes_a_row, pieces = max(piece // vector, 1), -(-n_cols // piece)
    warps = max(8 if sums else 4, lanes_a_row // lanes)
    if warps == _MAX_WARPS:
        limit = 0 if sums else 32 if backward else 64
    if pieces * vector > limit:
        return None
    return RowTile(rows=max(warps * lanes // lanes_a_row, 1), piece=piece, pieces=pieces, warps=warps)


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

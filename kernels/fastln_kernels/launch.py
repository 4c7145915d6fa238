"""Launch choices, apart from the kernels: how much of a tensor one program takes, with how many warps, and how many.

A lane loads 16 bytes at once, so a warp covers 512 bytes of a row.

| choice                       | value                  | why                                                     |
|------------------------------|------------------------|---------------------------------------------------------|
| warps of a row tile          | what covers a row once,| a thread then holds the same few columns of all the     |
|                              | 1 to 16                | tile's rows: sums over rows stay in its registers       |
| elements a thread, forward   | 32                     | 8 KB asked for by a program of 4 warps (bf16), and      |
|                              |                        | several programs an SM                                  |
| elements a thread, backward  | 16                     | two inputs and two sums are held at once, no spills     |
| widest row tile              | 8,192 columns          | wider, the registers of 512 threads cannot hold a row's |
|                              |                        | backward: kernels that loop over blocks of columns      |
| column tile                  | 16 rows x 128 columns, | 128 divides 384, 768, 1,152 and 1,280: nothing padded;  |
|                              | 4 warps                | a row's piece is whole 128-byte lines                   |
| programs that keep sums      | 8 warps an SM          | an H100's SM wants 15 KB asked for: 8 warps x 2 inputs  |
|                              |                        | x 2 rows x 512 bytes = 16 KB; each more program costs   |
|                              |                        | a row of sums, written and read                         |
"""

import functools
from dataclasses import dataclass

import torch

MAX_ROW_TILE = 8192
"""The widest row, in columns, that a program holds in registers."""

_SUMMING_WARPS_PER_SM = 8
_SMS_WITHOUT_GPU = 2  # under the interpreter: few enough that every program loops, as on a GPU


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program takes at a time.

    Attributes:
        rows: Rows of the tile.
        cols: Columns of the tile, a power of two.
        warps: Warps that share it.
    """

    rows: int
    cols: int
    warps: int


COLUMN_TILE = Tile(rows=16, cols=128, warps=4)
"""For sums over rows of a piece of the columns."""

FINISH_TILE = Tile(rows=32, cols=32, warps=4)
"""For the last sum, over the programs' partial sums: narrow, so that a short vector still makes many programs."""


@functools.cache
def row_tile(n_cols: int, itemsize: int, *, backward: bool) -> Tile:
    """The tile of whole rows, or, for rows wider than `MAX_ROW_TILE`, of one block of a row's columns.

    Args:
        n_cols: Columns of a row.
        itemsize: Bytes of an element.
        backward: Whether the tile is for the backward.
    """
    vector = 16 // itemsize
    if n_cols > MAX_ROW_TILE:
        return Tile(rows=1, cols=4096, warps=16)
    cols = 1 << (n_cols - 1).bit_length()
    warps = min(max(cols // (32 * vector), 1), 16)
    elements = 32 * warps * (16 if backward else 32)
    return Tile(rows=max(elements // cols, 1), cols=cols, warps=warps)


def summing_programs(device: torch.device, tile: Tile) -> int:
    """How many programs with partial sums of their own to start, so that each SM is busy and no more.

    Args:
        device: Where the kernel will run.
        tile: What each of them takes at a time.
    """
    return _sm_count(device) * max(_SUMMING_WARPS_PER_SM // tile.warps, 1)


@functools.cache
def _sm_count(device: torch.device) -> int:
    if device.type != "cuda":
        return _SMS_WITHOUT_GPU
    return torch.cuda.get_device_properties(device).multi_processor_count

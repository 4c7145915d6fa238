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
| ... of 16 warps          | forward 64, dx 32; 32 after| 512 threads have 128 registers each: 64 elements take 32   |
|                          | a prologue, on AMD and     | in 16 bits. With sums only dweight's and dbias's without   |
|                          | Blackwell, there dx 24;    | rows fit beside one row, in 16 bits. Numbers are those at  |
|                          | sums 32 without rows       | which nothing spills; wider rows: blocks of columns        |
| blocks of columns        | 8 warps, one program an    | rows at work stay in the L2 from their sums to their       |
|                          | SM, a lane 255 registers   | results; 8 warps with twice the registers of 16 leave more |
|                          |                            | for sums, since addresses are held once a lane             |
| blocks asked for at once | of each of two tensors 8,  | a Blackwell SM wants 32 KB, and more where it reads twice: |
|                          | of one 16: 64 KB; 4 beside | 54 KB for dx. In 16 bits a float32 weight takes as many    |
|                          | sums in 16 bits or after a | registers as both tensors. AMD's blocks are twice as wide  |
|                          | prologue, likewise on AMD  |                                                            |
| sums kept on the way     | 128 registers a lane; 64   | those of dweight and dbias up to 16,384 columns, of one of |
|                          | after a prologue and on    | them up to 32,768 (AMD: the same, a block being twice as   |
|                          | AMD; 32 for both           | wide). Dropout's numbers need some. Others are made apart  |
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
| last sum's tile          | 512 rows x 8 columns, 4    | more rows than there are SMs: all are asked for at once,   |
|                          | warps                      | and 8 columns make 96 programs of a row of 768             |
"""

import contextlib
import functools
from dataclasses import dataclass, replace

import torch

LANES = 64 if torch.version.hip else 32
"""Lanes of a warp."""

_NARROWEST = 16  # lanes that share a row, where the row is long enough
_MAX_WARPS = 16
_WIDE_WARPS = 8
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
    """

    prefetch: bool = False


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


@dataclass(frozen=True, slots=True)
class WideTile:
    """Blocks of a row's columns; one program goes through all of them.

    Attributes:
        cols: Columns of a block, a power of two.
        group: How many blocks are loaded at once.
        sums: How many sums over rows (of dweight, of dbias) the program keeps.
        warps: Warps that share it.
        max_registers: How many a lane may have; None leaves it to the compiler.
    """

    cols: int
    group: int
    sums: int
    warps: int
    max_registers: int | None


COLUMN_TILE = ColumnTile(rows=16, cols=128, warps=4)
"""For sums over rows of a piece of the columns."""

FINISH_TILE = ColumnTile(rows=512, cols=8, warps=4)
"""For the last sum, over the programs' partial sums."""


def elementwise_block(itemsize: int) -> ColumnTile:
    """The block of neighbouring elements that one program takes in an operation without sums.

    Args:
        itemsize: Bytes of an element.
    """
    return ColumnTile(rows=1, cols=2 * (16 // itemsize) * LANES * 4, warps=4)


def forward_tile(n_cols: int, itemsize: int, device: torch.device, *, prologue: bool) -> RowTile | None:
    """The forward's tile of whole rows, or None for rows that the registers cannot hold.

    Args:
        n_cols: Columns of a row.
        itemsize: Bytes of an element.
        device: Where the kernel will run.
        prologue: Whether dropout or a residual comes before the norm.
    """
    tile = _row_tile(n_cols, itemsize, LANES, 4, 40, 40, 32 if prologue or is_tight(device) else 64)
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
    prologue: bool,
) -> BackwardTile | None:
    """The backward's tile of whole rows, or None where the registers cannot hold it.

    Args:
        n_cols: Columns of a row.
        itemsize: Bytes of an element.
        device: Where the kernel will run.
        n_inputs: How many tensors of rows are read.
        n_sums: How many sums over rows (of dweight, of dbias) the programs keep.
        need_rows: Whether gradients of rows are made.
        prologue: Whether dropout or a residual came before the norm.
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
    registers = elements * (n_sums + need_rows) + 2 * n_inputs * elements * itemsize // 4
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


def wide_tile(n_cols: int, itemsize: int, *, n_inputs: int, n_sums: int, prologue: bool) -> WideTile:
    """How a program goes through rows that no `RowTile` holds.

    Args:
        n_cols: Columns of a row.
        itemsize: Bytes of an element.
        n_inputs: How many tensors of rows make a row's sums.
        n_sums: How many sums over rows (of dweight, of dbias) are wanted.
        prologue: Whether dropout or a residual comes before the norm.
    """
    cols = 16 // itemsize * LANES * _WIDE_WARPS
    blocks = -(-n_cols // cols)
    elements = blocks * 16 // itemsize
    sums = min((128 >> (prologue + (LANES == 64))) // elements, n_sums)
    crowded = (sums or LANES == 64) and (prologue or itemsize == 2)
    group = 16 if n_inputs == 1 else 4 if crowded else 8
    return WideTile(cols, min(group, blocks), sums, _WIDE_WARPS, _capped(255))


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

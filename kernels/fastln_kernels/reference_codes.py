"""Codes: rows, derivatives and gated products in 8, 4 or 2 bits, as they may be kept for the backward.

The definition in plain PyTorch. `docs/kernels/codes.md` derives the bounds of the errors. There are two sorts.

*Symmetric codes* are whole numbers times a scale: `value ≈ code * scale`, where the scale is the largest magnitude
divided by 127 (8 bits) or 7 (4 bits). x_hat of a norm and what a gated activation keeps have a scale per group of
neighbouring columns. Where all magnitudes are below 1e-30 the scale and the codes are 0. Where one is NaN or infinite
the scale is NaN and the codes are 0, so that all of the group decodes to NaN.

*Codes of derivatives* number levels that are fixed for the kind of activation. With 8 bits the levels are uniform, 0
and 1 among them, and code 255 means NaN. With 4 bits 15 levels are where derivatives are frequent, and code 15 means
NaN. With 2 bits there are 4 levels and no NaN: it becomes code 0. (It is then in the activation's result, too, and
reaches the loss and the gradients from there.) ReLU's derivative is 0 or 1, which all codes hold exactly.

Two codes of 4 bits, or four of 2, share a byte. The first column has the lowest bits. A row of odd length is filled up
with zero bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastln_kernels.reference_activation import ActivationKind

Bits = Literal[8, 4, 2]
"""The widths of a derivative's code."""

GatedBits = Literal[8, 4]
"""The widths of the codes of a gated activation."""

GROUPS = {8: 64, 4: 32}
"""How many neighbouring columns share a scale, by the width of a symmetric code. The last group may have fewer."""

LARGEST = {8: 127, 4: 7}
"""The largest symmetric code; its negative is the smallest."""

ZERO = 8
"""What is added to symmetric codes of 4 bits, so that they are 1 to 15."""

SMALLEST = 1e-30
"""A group without larger magnitudes counts as zero."""


class SlopeSteps(NamedTuple):
    """The 255 uniform levels of a derivative: `(code - zero) / steps`, for codes from 0 to 254.

    Attributes:
        zero: The code of a derivative of 0.
        steps: How many steps there are from 0 to 1. As many as fit, with the derivative's range inside the levels.
    """

    zero: int
    steps: int


SLOPE_STEPS: dict[ActivationKind, SlopeSteps] = {
    "gelu": SlopeSteps(26, 201),
    "gelu_tanh": SlopeSteps(26, 201),
    "quick_gelu": SlopeSteps(21, 210),
    "silu": SlopeSteps(21, 210),
    "relu": SlopeSteps(0, 254),
}

NAN_CODES = {8: 255, 4: 15}
"""The code of a derivative that is NaN. There is none in 2 bits."""

N_LEVELS = {4: 15, 2: 4}
"""How many levels a derivative has in codes of 4 and of 2 bits."""

LEVELS: dict[tuple[ActivationKind, int], tuple[float, ...]] = {
    ("gelu", 4): (
        -0.1174,
        -0.0707,
        -0.0162,
        0.0565,
        0.1349,
        0.2179,
        0.3052,
        0.3963,
        0.4909,
        0.5889,
        0.6900,
        0.7941,
        0.9007,
        1.0084,
        1.1035,
    ),
    ("gelu", 2): (-0.0714, 0.2267, 0.5873, 0.9963),
    ("gelu_tanh", 4): (
        -0.1174,
        -0.0707,
        -0.0158,
        0.0568,
        0.1351,
        0.2181,
        0.3053,
        0.3963,
        0.4909,
        0.5888,
        0.6899,
        0.7940,
        0.9005,
        1.0083,
        1.1036,
    ),
    ("gelu_tanh", 2): (-0.0715, 0.2264, 0.5871, 0.9962),
    ("quick_gelu", 4): (
        -0.0908,
        -0.0538,
        -0.0082,
        0.0602,
        0.1353,
        0.2161,
        0.3017,
        0.3914,
        0.4848,
        0.5813,
        0.6804,
        0.7814,
        0.8834,
        0.9847,
        1.0769,
    ),
    ("quick_gelu", 2): (-0.0550, 0.2322, 0.5891, 0.9841),
    ("silu", 4): (
        -0.0859,
        -0.0318,
        0.0289,
        0.0932,
        0.1608,
        0.2314,
        0.3052,
        0.3824,
        0.4630,
        0.5476,
        0.6366,
        0.7308,
        0.8311,
        0.9389,
        1.0553,
    ),
    ("silu", 2): (-0.0297, 0.2218, 0.5203, 0.8837),
    ("relu", 4): tuple(level / 14 for level in range(15)),
    ("relu", 2): (0.0, 1 / 3, 2 / 3, 1.0),
}
"""The levels in 4 and 2 bits, ascending, from `scripts/derivative_levels.py`; ReLU's need only hold 0 and 1."""


class GatedCodes(NamedTuple):
    """What a gated activation keeps: the two factors of its gradients, in symmetric codes.

    Attributes:
        value: Of `activation(gate)`, the factor of dup. In 8 bits `(..., n_cols)`, int8; in 4 bits
            `(..., ceil(n_cols / 2))`, uint8.
        slope: Of `up * activation'(gate)`, the factor of dgate; likewise.
        value_scale: `(..., ceil(n_cols / group))`, float32, with a group of 64 columns in 8 bits and of 32 in 4.
        slope_scale: Likewise.
    """

    value: Tensor
    slope: Tensor
    value_scale: Tensor
    slope_scale: Tensor

    @property
    def bits(self) -> int:
        """The width of a code."""
        return 8 if self.value.dtype == torch.int8 else 4


def encode_groups(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the symmetric codes of `(..., n_cols)` and a scale per group; shapes as in `GatedCodes`."""
    x = torch.atleast_1d(x)
    n_cols, group = x.shape[-1], GROUPS[bits]
    n_groups = -(-n_cols // group)
    padded = torch.nn.functional.pad(x.to(torch.float32), (0, n_groups * group - n_cols))
    codes, scale = _symmetric(padded.unflatten(-1, (n_groups, group)), bits)
    codes = codes.flatten(-2)[..., :n_cols]
    return codes.contiguous() if bits == 8 else pack((codes + ZERO).to(torch.uint8), bits), scale


def decode_groups(codes: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the tensor of a shape that codes of groups stand for, in the dtype of the arithmetic."""
    bits, n_cols = 8 if codes.dtype == torch.int8 else 4, shape[-1] if shape else 1
    whole = codes.to(dtype) if bits == 8 else unpack(codes, bits, n_cols).to(dtype) - ZERO
    return (whole * scale.to(dtype).repeat_interleave(GROUPS[bits], -1)[..., :n_cols]).view(shape)


def encode_slopes(slopes: Tensor, kind: ActivationKind, bits: int) -> Tensor:
    """Return the codes of derivatives `(..., n_cols)`: `(..., ceil(n_cols * bits / 8))`, uint8."""
    slopes = torch.atleast_1d(slopes)
    if bits == 8:
        zero, steps = SLOPE_STEPS[kind]
        codes = (slopes * steps + zero).round().clamp(0, NAN_CODES[8] - 1)
    else:
        bounds = slopes.new_tensor(thresholds(kind, bits))
        codes = torch.bucketize(slopes, bounds).to(slopes.dtype)  # how many bounds are below
    return pack(codes.masked_fill(slopes.isnan(), NAN_CODES.get(bits, 0)).to(torch.uint8), bits)


def decode_slopes(codes: Tensor, kind: ActivationKind, bits: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the derivatives of a shape that codes stand for, in the dtype of the arithmetic."""
    table = slope_table(kind, bits).to(codes.device, dtype)
    return table[unpack(codes, bits, shape[-1] if shape else 1).long()].view(shape)


def slope_table(kind: ActivationKind, bits: int) -> Tensor:
    """Return the derivative that each code stands for: `(2^bits,)`, float64 on the CPU."""
    if bits == 8:
        zero, steps = SLOPE_STEPS[kind]
        levels = ((torch.arange(NAN_CODES[8], dtype=torch.float64) - zero) / steps).tolist()
    else:
        levels = list(LEVELS[kind, bits])
    return torch.tensor(levels + [math.nan] * (2**bits - len(levels)), dtype=torch.float64)


def thresholds(kind: ActivationKind, bits: int) -> tuple[float, ...]:
    """Return the numbers half way between the levels in 4 or 2 bits. A code is the number of those below its slope."""
    return tuple((low + high) / 2 for low, high in itertools.pairwise(LEVELS[kind, bits]))


def code_shape(shape: torch.Size, bits: int) -> tuple[int, ...]:
    """Return the shape of the codes of a tensor: each row has whole bytes. A tensor `()` is one row of one number."""
    *rows, n_cols = shape or (1,)
    return (*rows, -(-n_cols * bits // 8))


def scale_shape(shape: Sequence[int], bits: int) -> tuple[int, ...]:
    """Return the shape of the scales of symmetric codes of so many bits."""
    *rows, n_cols = shape or (1,)
    return (*rows, -(-n_cols // GROUPS[bits]))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Put codes `(..., n_cols)`, uint8, into bytes: `(..., ceil(n_cols * bits / 8))`, uint8, contiguous."""
    per_byte = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
    codes = codes.unflatten(-1, (codes.shape[-1] // per_byte, per_byte))
    shifts = torch.arange(0, 8, bits, device=codes.device)
    return (codes.to(torch.int32) << shifts).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, n_cols: int) -> Tensor:
    """Undo `pack`: `(..., n_cols)`, int32."""
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.int32)
    return ((packed.to(torch.int32)[..., None] >> shifts) & (2**bits - 1)).flatten(-2)[..., :n_cols]


def _symmetric(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes of the last dimension of a float32 tensor, int8, and a scale for each of the others."""
    largest = LARGEST[bits]
    finite = x.isfinite().all(-1)
    top = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    is_zero = top < SMALLEST
    # A number divided by a tensor would be a product with its reciprocal, which rounds twice.
    inverse = torch.where(is_zero | ~finite, 0.0, torch.full_like(top, largest) / top)
    scale = torch.where(finite, torch.where(is_zero, 0.0, top / largest), math.nan)
    x = torch.where(finite[..., None], x, 0.0)
    return (x * inverse[..., None]).round().clamp(-largest, largest).to(torch.int8), scale

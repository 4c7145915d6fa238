"""Codes of compressed storage in registers: encoding, packing into bytes, and back. `reference_codes` defines them.

The last axis of a tile runs along a row, so that columns that share a byte are neighbours in one lane.
"""

# mypy: allow-untyped-defs, disable-error-code="assignment, misc, var-annotated"
import functools
import math

import triton
import triton.language as tl

from fastln_kernels import reference_codes
from fastln_kernels.int8_rows import ROUNDER, magnitude, scales, whole
from fastln_kernels.reference_activation import ActivationKind

ZERO = tl.constexpr(reference_codes.ZERO)


@functools.cache
def slope_constants(kind: ActivationKind, bits: int) -> dict[str, tuple[float, ...]]:
    """Return what kernels are told about the codes of a derivative.

    Returns:
        `BOUNDS`: what separates neighbouring levels, filled up with infinity to `2^bits - 1` numbers. `LEVELS`: the
        levels, filled up with zeros to `2^bits`. With 8 bits both are `(zero, steps)`.
    """
    if bits == 8:
        zero, steps = map(float, reference_codes.SLOPE_STEPS[kind])
        return {"BOUNDS": (zero, steps), "LEVELS": (zero, steps)}
    bounds, levels = reference_codes.thresholds(kind, bits), reference_codes.LEVELS[kind, bits]
    return {
        "BOUNDS": bounds + (math.inf,) * (2**bits - 1 - len(bounds)),
        "LEVELS": levels + (0.0,) * (2**bits - len(levels)),
    }


@triton.jit
def encode_slope(slope, BOUNDS: tl.constexpr, BITS: tl.constexpr):
    """Return the codes of derivatives, int32. A code of 4 or 2 bits is the number of bounds below, found by halving."""
    if BITS == 8:
        # The levels reach beyond the derivative's extremes, so that no bounds are needed. The sum leaves the nearest
        # whole number in the low bits.
        code = (slope * BOUNDS[1] + BOUNDS[0] + ROUNDER).to(tl.int32, bitcast=True) & 255
        return tl.where(slope == slope, code, 255)
    elif BITS == 4:
        b3 = slope > BOUNDS[7]
        b2 = slope > tl.where(b3, BOUNDS[11], BOUNDS[3])
        b1 = slope > tl.where(b3, tl.where(b2, BOUNDS[13], BOUNDS[9]), tl.where(b2, BOUNDS[5], BOUNDS[1]))
        upper = tl.where(b2, tl.where(b1, BOUNDS[14], BOUNDS[12]), tl.where(b1, BOUNDS[10], BOUNDS[8]))
        lower = tl.where(b2, tl.where(b1, BOUNDS[6], BOUNDS[4]), tl.where(b1, BOUNDS[2], BOUNDS[0]))
        b0 = slope > tl.where(b3, upper, lower)
        code = b3.to(tl.int32) * 8 + b2.to(tl.int32) * 4 + b1.to(tl.int32) * 2 + b0.to(tl.int32)
        return tl.where(slope == slope, code, 15)
    else:
        b1 = slope > BOUNDS[1]
        b0 = slope > tl.where(b1, BOUNDS[2], BOUNDS[0])
        return b1.to(tl.int32) * 2 + b0.to(tl.int32)


@triton.jit
def decode_slope(code, LEVELS: tl.constexpr, BITS: tl.constexpr):
    """Return the derivatives, float32, that codes (int32) stand for."""
    if BITS == 8:
        slope = (code.to(tl.float32) - LEVELS[0]) * (1.0 / LEVELS[1])
    else:
        level = ()
        odd = (code & 1) != 0
        for k in tl.static_range(2 ** (BITS - 1)):
            level += (tl.where(odd, LEVELS[2 * k + 1], LEVELS[2 * k]),)
        for bit in tl.static_range(1, BITS):
            half = ()
            odd = (code & (1 << bit)) != 0
            for k in tl.static_range(2 ** (BITS - 1 - bit)):
                half += (tl.where(odd, level[2 * k + 1], level[2 * k]),)
            level = half
        slope = level[0]
    if BITS == 2:
        return slope
    else:
        return tl.where(code == 2**BITS - 1, float("nan"), slope)


@triton.jit
def times_decoded(dy, slope, KIND: tl.constexpr):
    """Return `dy` times a derivative, both float32. ReLU's selects, so that 0 times infinity is no NaN."""
    if KIND == "relu":
        return tl.where(slope == 0, 0.0, dy)
    else:
        return dy * slope


@triton.jit
def pack(code, BITS: tl.constexpr):
    """Put the codes of a tile `(rows, cols)`, int32, into bytes `(rows, cols * BITS / 8)`, uint8."""
    if BITS == 2:
        first, second = tl.split(tl.reshape(code, [code.shape[0], code.shape[1] // 2, 2]))
        code = first | (second << 2)
    if BITS < 8:
        first, second = tl.split(tl.reshape(code, [code.shape[0], code.shape[1] // 2, 2]))
        code = first | (second << 4)
    return code.to(tl.uint8)


@triton.jit
def unpack(packed, BITS: tl.constexpr):
    """Undo `pack`."""
    code = packed.to(tl.int32)
    if BITS == 4:
        return tl.interleave(code & 15, code >> 4)
    elif BITS == 2:
        return tl.interleave(tl.interleave(code & 3, (code >> 4) & 3), tl.interleave((code >> 2) & 3, code >> 6))
    else:
        return code


@triton.jit
def symmetric(x, mask, BITS: tl.constexpr):
    """Return symmetric codes of each row of a tile `(groups, columns)`, packed, and the rows' scales.

    Columns that `mask` leaves out don't count, and get zero bits.
    """
    LARGEST: tl.constexpr = 127.0 if BITS == 8 else 7.0
    top = tl.max(tl.where(mask, magnitude(x), 0), axis=1)
    inverse, scale = scales(top, LARGEST)
    codes = whole(x, inverse, LARGEST)
    if BITS == 8:
        return codes, scale
    else:
        return pack(tl.where(mask, codes.to(tl.int32) + ZERO, 0), BITS), scale


@triton.jit
def decode_symmetric(codes, scale, BITS: tl.constexpr):
    """Return what the codes of each row of a tile stand for, in float32, given the rows' scales."""
    if BITS == 8:
        return codes.to(tl.float32) * scale[:, None]
    else:
        return (unpack(codes, BITS) - ZERO).to(tl.float32) * scale[:, None]

"""Find the levels of an activation's derivative that its codes of 4 and of 2 bits stand for.

    python scripts/derivative_levels.py

The levels are those of Lloyd and Max (IEEE Trans. Inf. Theory 28, 1982): each is the mean of the derivatives that are
nearer to it than to any other level. So the decoded derivative is right on average, within each code and as a whole,
and moving a level makes the mean square error larger. The argument x is normal, mixed in equal parts over the means and
deviations below. They stand for the layers of DINOv2-small and of all-MiniLM-L6-v2, whose means are from -1.5 to -0.4
and whose deviations are from 0.7 to 1.1, but for DINOv2's first layer.

The printed levels belong in `fastln_kernels.reference_codes.LEVELS`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastln_kernels.reference_activation import ACTIVATION_KINDS, ActivationKind, activation_backward
from fastln_kernels.reference_codes import N_LEVELS, decode_slopes, encode_slopes

MEANS = (-1.25, -0.75, -0.25)
DEVIATIONS = (0.6, 0.9, 1.2)


def derivatives(kind: ActivationKind, n: int = 1 << 18) -> tuple[Tensor, Tensor]:
    """Return the derivatives at points of the argument's range, in ascending order, and their shares; both float64."""
    x = torch.linspace(-10, 10, n, dtype=torch.float64)
    shares = torch.zeros_like(x)
    for mean in MEANS:
        for deviation in DEVIATIONS:
            shares += torch.exp(-0.5 * ((x - mean) / deviation).square()) / deviation
    slopes, order = activation_backward(torch.ones_like(x), x, kind).sort()
    return slopes, (shares / shares.sum())[order]


def cell_means(slopes: Tensor, shares: Tensor, levels: Tensor) -> Tensor:
    """Return for each level the mean of the values that are nearer to it than to any other.

    Args:
        slopes: The values, ascending.
        shares: How often each occurs.
        levels: Ascending.
    """
    ends = torch.searchsorted(slopes, (levels[1:] + levels[:-1]) / 2)
    ends = torch.cat((ends.new_zeros(1), ends, ends.new_full((1,), len(slopes))))
    sums = [torch.cat((part.new_zeros(1), part.cumsum(0)))[ends].diff() for part in (shares * slopes, shares)]
    return sums[0] / sums[1]


def lloyd_max(slopes: Tensor, shares: Tensor, n_levels: int, *, steps: int = 3000) -> Tensor:
    """Return `n_levels` levels that are the means of their cells, ascending.

    Args:
        slopes, shares: As for `cell_means`.
        n_levels: How many levels.
        steps: How often levels and cells are fitted to each other.
    """
    levels = torch.linspace(slopes[0].item(), slopes[-1].item(), n_levels + 2, dtype=slopes.dtype)[1:-1].contiguous()
    for _ in range(steps):
        levels = cell_means(slopes, shares, levels)
    return levels


def errors(kind: ActivationKind, bits: int) -> tuple[float, float]:
    """Return the root mean square error and the mean error of the committed levels, relative to the derivatives'."""
    slopes, shares = derivatives(kind, 1 << 16)
    off = decode_slopes(encode_slopes(slopes, kind, bits), kind, bits, slopes.shape, slopes.dtype) - slopes
    size = (shares * slopes.square()).sum().sqrt()
    return ((shares * off.square()).sum().sqrt() / size).item(), ((shares * off).sum() / size).item()


def main() -> None:
    """Print the levels, and the errors of the committed ones."""
    for kind in ACTIVATION_KINDS:
        if kind == "relu":
            continue  # its derivative is 0 or 1
        for bits, n_levels in N_LEVELS.items():
            levels = lloyd_max(*derivatives(kind), n_levels)
            print(f"{kind}, {bits} bits: ({', '.join(f'{level:.4f}' for level in levels.tolist())})")
        for bits in (8, 4, 2):
            rms, mean = errors(kind, bits)
            print(f"{kind}, {bits} bits: error {rms:.4f} of the derivative (root mean square), {mean:+.5f} on average")


if __name__ == "__main__":
    main()

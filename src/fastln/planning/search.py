"""The largest size of which a peak fits into a budget."""

from __future__ import annotations

from collections.abc import Callable


def largest(peak: Callable[[int], int], budget: int, *, start: int, most: int) -> int:
    """Return the largest number from 1 to `most` whose peak is within the budget; 0 if there is none.

    Peaks grow with the size, nearly in a straight line. So a line through the two nearest known sizes says where to
    look next; or, if the last two looks did not halve what is left, its middle.

    Args:
        peak: The peak of a size, in bytes; each size is asked for once.
        budget: In bytes.
        start: A size to begin with.
        most: The largest size that counts.
    """
    known: dict[int, int] = {}
    fitting, too_large = 0, most + 1
    widths: list[int] = []
    guess = max(1, min(start, most))
    while too_large - fitting > 1:
        known[guess] = peak(guess)
        if known[guess] <= budget:
            fitting = guess
        else:
            too_large = guess
        widths.append(too_large - fitting)
        is_slow = len(widths) > 2 and too_large in known and widths[-1] > widths[-3] / 2
        guess = (fitting + too_large) // 2 if is_slow else _guess(known, budget, fitting)
        guess = max(fitting + 1, min(too_large - 1, guess))
    return fitting


def _guess(known: dict[int, int], budget: int, fitting: int) -> int:
    """Return where the line through the two sizes nearest to the budget meets it, or a first guess."""
    nearest = sorted(known, key=lambda size: abs(known[size] - budget))[:2]
    if len(nearest) < 2:
        return fitting * 2 or 1
    one, other = nearest
    slope = (known[other] - known[one]) / (other - one)
    if slope <= 0:
        return fitting * 2
    guess = on_the_line((one, known[one]), (other, known[other]), budget)
    return guess + (guess == fitting)  # the neighbour settles whether it is the last


def on_the_line(one: tuple[int, int], other: tuple[int, int], budget: int) -> int:
    """Return the size at which the line through two sizes with their peaks meets the budget, rounded down; 0 if none.

    A peak is the sum of what does not depend on the batch and of what grows with it, so this is exact up to rounding,
    if the peak is at the same time of the step.
    """
    (size, peak), (other_size, other_peak) = one, other
    slope = (other_peak - peak) / (other_size - size)
    return max(int(size + (budget - peak) / slope), 0) if slope > 0 else size

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
        guess = (fitting + too_large) // 2 if is_slow else _on_the_line(known, budget, fitting)
        guess = max(fitting + 1, min(too_large - 1, guess))
    return fitting


def _on_the_line(known: dict[int, int], budget: int, fitting: int) -> int:
    """Return where the line through the two sizes nearest to the budget meets it, or a first guess."""
    nearest = sorted(known, key=lambda size: abs(known[size] - budget))[:2]
    if len(nearest) < 2:
        return fitting * 2 or 1
    one, other = nearest
    slope = (known[other] - known[one]) / (other - one)
    if slope <= 0:
        return fitting * 2
    guess = int(one + (budget - known[one]) / slope)
    return guess + (guess == fitting)  # the neighbour settles whether it is the last

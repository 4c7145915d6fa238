"""The largest size that fits, found with few looks."""

import pytest

from fastln.planning.search import largest


@pytest.mark.parametrize(
    "peak",
    [
        lambda n: 100 + 7 * n,
        lambda n: max(500, 100 + 7 * n),
        lambda n: 100 + 7 * n + n * n,
        lambda n: max(100 + n, 40 * n - 300),
        lambda n: 1000 * (n > 50) + n,
    ],
)
@pytest.mark.parametrize("budget", [0, 107, 640, 5_000, 10**9])
@pytest.mark.parametrize("start", [1, 8, 300])
def test_the_largest_that_fits(peak, budget, start):
    asked = []

    def look(n):
        asked.append(n)
        return peak(n)

    found = largest(look, budget, start=start, most=4096)
    assert found == max((n for n in range(1, 4097) if peak(n) <= budget), default=0)
    assert len(asked) == len(set(asked)) <= 26


def test_a_straight_line_takes_few_looks():
    asked = []
    assert largest(lambda n: asked.append(n) or 12_853 + 1_647 * n, 24_576, start=4, most=1 << 16) == 7
    assert len(asked) <= 4

"""Which of the tests that are marked `slow` a run takes: none, all, or a sample that rotates from run to run.

`--slow sample` takes a few of each pool. A test function is a pool of its own, of which a run takes one case, unless
the mark says otherwise: `slow(take=8)` takes eight, and all functions of `slow(pool="large")` are one pool. What
takes minutes is in none, by `slow(take=0)`. A number says which cases: the next number takes the next ones, until all
have been taken. By default it is the days since 1970 plus the commits so far. So it moves on with every day and every
commit, and a commit that is run again on the same day gets the same sample. FASTLN_SAMPLE gives another number. Where
`-m` is given it alone chooses.
"""

import os
import random
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import pytest

NUMBER = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow", choices=("none", "sample", "all"), default="none", help="how many of the slow tests run (no -m given)"
    )


def pytest_configure(config: pytest.Config) -> None:
    # The workers of one run get its number: they must collect the same tests, even over midnight.
    given = getattr(config, "workerinput", {}).get("sample")
    config.stash[NUMBER] = _number() if given is None else given


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    node.workerinput["sample"] = node.config.stash[NUMBER]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    how = config.getoption("slow")
    if how == "all" or config.getoption("markexpr"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    left = set(slow) - set(sample(slow, config.stash[NUMBER]) if how == "sample" else [])
    config.hook.pytest_deselected(items=[item for item in items if item in left])
    items[:] = [item for item in items if item not in left]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    # Here and not in the header, which `-q` leaves out.
    if config.getoption("slow") == "sample":
        number = config.stash[NUMBER]
        terminalreporter.write_line(f"slow tests: sample {number}; FASTLN_SAMPLE={number} takes the same again")


def sample(items: list[pytest.Item], number: int) -> list[pytest.Item]:
    """Return what the run of that number takes of each pool.

    Numbers in a row take all of a pool before they take any again. Cases that stand beside each other are alike, so
    the pool is shuffled, always in the same way.
    """
    pools, sizes = defaultdict(list), {}
    for item in items:
        mark = item.get_closest_marker("slow")
        name, take = mark.kwargs.get("pool", item.nodeid.partition("[")[0]), mark.kwargs.get("take", 1)
        if take:
            pools[name].append(item)
            sizes[name] = take
    taken = []
    for name, pool in pools.items():
        pool.sort(key=lambda item: item.nodeid)
        random.Random(0).shuffle(pool)
        start, n = number * sizes[name], min(sizes[name], len(pool))
        taken += [pool[(start + i) % len(pool)] for i in range(n)]
    return taken


def _number() -> int:
    """Return FASTLN_SAMPLE, or the days since 1970 plus the commits of this checkout."""
    given = os.environ.get("FASTLN_SAMPLE")
    if given is not None:
        if not given.isdecimal():
            raise pytest.UsageError(f"FASTLN_SAMPLE is {given!r}; it must be a whole number, 0 or more")
        return int(given)
    days = int(time.time() // 86400)
    command = ["git", "rev-list", "--count", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return days
    return days + int(done.stdout or 0)

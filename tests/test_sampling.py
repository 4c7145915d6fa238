"""The sample of slow tests: each run takes some, all of them have their turn, and every worker takes the same."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import sampling
from sampling import sample

PROGRAM = """
import pytest
@pytest.mark.slow
@pytest.mark.parametrize("case", range(5))
def test_one_of_five(case): pass
@pytest.mark.slow(take=2)
@pytest.mark.parametrize("case", range(5))
def test_two_of_five(case): pass
@pytest.mark.slow(take=0)
def test_never(): pass
@pytest.mark.slow(pool="shared")
@pytest.mark.parametrize("case", range(3))
def test_shared(case): pass
@pytest.mark.slow(pool="shared")
def test_shared_too(): pass
def test_always(): pass
"""


class Item:
    def __init__(self, nodeid, **options):
        self.nodeid, self._mark = nodeid, pytest.mark.slow(**options).mark

    def get_closest_marker(self, name):
        return self._mark


def items(n, name="test_x.py::test", **options):
    return [Item(f"{name}[{i}]", **options) for i in range(n)]


@pytest.mark.parametrize(("n", "take"), [(1, 1), (5, 1), (6, 2), (103, 8)])
def test_numbers_in_a_row_take_every_case_before_any_again(n, take):
    counts = Counter(item.nodeid for number in range(100, 100 + n) for item in sample(items(n, take=take), number))
    assert counts == {item.nodeid: take for item in items(n)}
    first = sample(items(n, take=take), 7) + sample(items(n, take=take), 8)
    assert len({item.nodeid for item in first}) == min(n, 2 * take)


def test_what_takes_minutes_is_in_no_pool():
    some = items(4) + items(2, "test_x.py::test[large]", take=0)
    taken = {item.nodeid for number in range(20) for item in sample(some, number)}
    assert taken == {item.nodeid for item in items(4)}


def test_the_order_of_collection_does_not_matter():
    taken = {item.nodeid for item in sample(items(9, take=3), 5)}
    assert {item.nodeid for item in sample(items(9, take=3)[::-1], 5)} == taken


def test_functions_share_a_pool_that_both_name():
    both = items(3, "test_x.py::test_one", pool="p") + items(2, "test_y.py::test_two", pool="p")
    assert sorted(item.nodeid for number in range(5) for item in sample(both, number)) == sorted(i.nodeid for i in both)
    assert len(sample(both + items(2), 3)) == 2


def test_the_number_is_given_or_moves_with_days_and_commits(monkeypatch):
    monkeypatch.setenv("FASTLN_SAMPLE", "17")
    assert sampling._number() == 17
    monkeypatch.setenv("FASTLN_SAMPLE", "today")
    with pytest.raises(pytest.UsageError, match="FASTLN_SAMPLE is 'today'; it must be a whole number"):
        sampling._number()
    monkeypatch.delenv("FASTLN_SAMPLE")
    monkeypatch.setattr(time, "time", lambda: 20_000 * 86400.0)
    commits = sampling._number() - 20_000
    assert commits >= 0
    monkeypatch.setattr(time, "time", lambda: 20_001 * 86400.0 - 1)
    assert sampling._number() == 20_000 + commits
    monkeypatch.setattr(time, "time", lambda: 20_001 * 86400.0)
    assert sampling._number() == 20_001 + commits


def run(folder, *options, number="3"):
    environment = os.environ | {"FASTLN_SAMPLE": number, "PYTHONPATH": str(Path(sampling.__file__).parent)}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, Counter(re.findall(r"^PASSED test_some\.py::(\w+)", done.stdout, re.MULTILINE))


def test_what_runs(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["sampling"]\n')
    (tmp_path / "test_some.py").write_text(PROGRAM)
    everything = {"one_of_five": 5, "two_of_five": 5, "never": 1, "shared": 3, "shared_too": 1, "always": 1}
    everything = {f"test_{name}": n for name, n in everything.items()}
    assert run(tmp_path)[1] == {"test_always": 1}
    assert run(tmp_path, "--slow", "all")[1] == everything
    assert run(tmp_path, "-m", "slow or not slow")[1] == everything
    output, ran = run(tmp_path, "--slow", "sample")
    assert ran.pop("test_shared", 0) + ran.pop("test_shared_too", 0) == 1
    assert ran == {"test_one_of_five": 1, "test_two_of_five": 2, "test_always": 1}
    assert "\nslow tests: sample 3; FASTLN_SAMPLE=3 takes the same again\n" in output
    assert re.match(r"5 passed, 11 deselected in ", output.splitlines()[-1])
    # Two workers that collected different tests would be an error of xdist's.
    output, _ = run(tmp_path, "--slow", "sample", "-n", "2")
    assert re.match(r"5 passed in ", output.splitlines()[-1])

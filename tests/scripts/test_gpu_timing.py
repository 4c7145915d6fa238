"""Timing without a GPU: works that run plainly, a clock that is made up."""

import dataclasses
import itertools

import pytest
import torch
from gpu_timing import Bench, copies_for, interleave, measure, summarise
from norm_cases import CASES, Work
from norm_checks import Configuration
from norm_peers import Implementation, load_fastln

FASTLN = load_fastln()[0]


def configuration(case="layer_norm-forward", dtype="fp32", n_rows=3, n_cols=16):
    return Configuration(CASES[case], n_rows, n_cols, dtype)


class FakeClock:
    """A replay takes the next of its durations, which the test chose."""

    def __init__(self, durations):
        self.durations = {name: itertools.cycle(own) for name, own in durations.items()}
        self.turns = []

    def __call__(self, replay):
        name = replay()
        self.turns.append(name)
        return next(self.durations[name])


def record_plainly(works, n_cycles):
    def replay():
        for work in list(works) * n_cycles:
            work.run()

    return replay


def bench(rounds=3, clock=None, l2_bytes=1 << 10):
    ticks = itertools.count(1)
    clock = clock or (lambda replay: 1e-3 * next(ticks))
    return Bench("a GPU", torch.device("cpu"), l2_bytes, rounds, record_plainly, clock)


def test_copies_fill_the_cache_several_times():
    assert copies_for(100, 50) == 2
    assert copies_for(100, 100) == 4
    assert copies_for(99, 100) == 5
    assert copies_for(1 << 30, 50 << 20) == 2


def test_implementations_take_turns_in_every_round():
    clock = FakeClock({"a": [1.0, 2.0], "b": [3.0], "c": [4.0]})
    replays = {name: lambda name=name: name for name in "abc"}
    seconds = interleave(replays, 4, clock)
    assert seconds == {"a": [1.0, 2.0, 1.0, 2.0], "b": [3.0] * 4, "c": [4.0] * 4}
    rounds = [tuple(clock.turns[i : i + 3]) for i in range(0, 12, 3)]
    assert all(sorted(turns) == ["a", "b", "c"] for turns in rounds)
    assert len(set(rounds)) > 1


def test_timing_is_a_median_beside_the_copy_of_the_same_round():
    timing = summarise([2.0, 4.0, 8.0], [1.0, 3.0, 4.0], n_bytes=10**9)
    assert (timing.low, timing.median, timing.high) == (3.0, 4.0, 6.0)
    assert timing.gb_per_s == 0.25
    assert timing.share_of_copy == 0.5


def test_a_configuration_is_checked_and_timed_per_call():
    def clock(replay):
        replay()
        return 1.0

    of = configuration("layer_norm-dx-dweight-dbias", "bf16", n_rows=4)
    copy, own = measure(of, [FASTLN], bench(rounds=2, clock=clock, l2_bytes=300))
    assert (copy.library, own.library) == ("copy", "fastln")
    assert (own.machine, own.width, own.n_rows, own.case) == ("a GPU", 16, 4, "layer_norm-dx-dweight-dbias")
    assert own.useful_bytes == copy.useful_bytes == 3 * 4 * 16 * 2
    assert own.compiled is own.predicted is None
    assert own.measured["n_copies"] == 4  # 4 x 300 bytes of cache, 384 bytes a call
    assert own.measured["seconds"] == [1 / 20] * 2
    assert own.measured["gb_per_s"] == pytest.approx(384 * 20 / 1e9)
    assert own.measured["share_of_copy"] == copy.measured["share_of_copy"] == 1.0
    assert own.measured["errors"]["dx"] <= own.measured["bounds"]["dx"]


def test_what_fails_its_check_or_raises_is_not_timed():
    def raises(case, given):
        raise RuntimeError("64 KB a row at most\nand more")

    def wrong(case, given):
        return Work(lambda: {"y": 1.5 * FASTLN.prepare(case, given).run()["y"]})

    recorded = []

    def record(works, n_cycles):
        recorded.append(works)
        return record_plainly(works, n_cycles)

    implementations = [Implementation("wrong", wrong), Implementation("raises", raises), FASTLN]
    setting = dataclasses.replace(bench(), record=record)
    _, failing, raising, right = measure(configuration(), implementations, setting)
    assert len(recorded) == 2  # the copy and fastln
    assert failing.measured.keys() == {"errors", "bounds"}
    assert failing.measured["errors"]["y"] > 0.3
    assert "relative error of y" in failing.error
    assert not raising.measured
    assert raising.error == "RuntimeError; 64 KB a row at most"
    assert right.error is None
    assert right.measured["median"] > 0

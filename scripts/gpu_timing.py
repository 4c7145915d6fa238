"""Time the implementations of a configuration on a GPU, taking turns, with cold inputs and a plain copy to compare."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from norm_cases import Results, Work
from norm_checks import SEED, Configuration, check, random_inputs
from norm_peers import Implementation
from report_rows import Row, notes, source_digest

CACHE_MULTIPLE = 4  # the copies of the inputs fill the L2 cache this many times
CALLS = 20  # minimum number of calls in one graph, so that the cost of a replay itself is small
COPY = "copy"

Replay = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """The time of a call, in seconds. `low` and `high` are the quartiles over the rounds."""

    seconds: list[float]
    median: float
    low: float
    high: float
    gb_per_s: float
    share_of_copy: float


@dataclass(frozen=True)
class Bench:
    """The settings of a measurement.

    Attributes:
        machine: Name of the GPU.
        device: The device of the tensors.
        l2_bytes: Size of the cache that must stay cold.
        rounds: How many turns each implementation gets.
        record: A function from works and a number of cycles to a function that replays them all.
        clock: A function that returns the seconds of one replay.
    """

    machine: str
    device: torch.device
    l2_bytes: int
    rounds: int
    record: Callable[[Sequence[Work], int], Replay]
    clock: Callable[[Replay], float]


def copies_for(bytes_per_call: int, l2_bytes: int) -> int:
    """Return how many copies of the inputs fill the cache `CACHE_MULTIPLE` times."""
    return max(2, math.ceil(CACHE_MULTIPLE * l2_bytes / bytes_per_call))


def copy_work(n_bytes: int, device: torch.device) -> Work:
    """Return a plain copy that moves `n_bytes`: it reads half of them and writes the other half."""
    source = torch.zeros(n_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Work(lambda: {"copy": target.copy_(source)})


def record_graph(works: Sequence[Work], n_cycles: int) -> Replay:
    """Record `n_cycles` cycles over the works in one CUDA graph, on the stream that prepared them."""
    for work in works:  # compiles and autotunes what is not yet compiled
        work.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Keep a call's results until its next turn, so that other calls do not write to the same memory.
    results: list[Results] = [{} for _ in works]
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(n_cycles):
            for i, work in enumerate(works):
                results[i] = {}
                results[i] = work.run()

    def replay() -> Sequence[Work]:
        graph.replay()
        return works  # the graph reads their memory, so they must live as long as the graph

    return replay


def gpu_seconds(replay: Replay) -> float:
    """Return the time of a replay by the GPU's clock, after one that is not timed.

    The timed replay is launched while the first one runs, so its launch is not part of its time.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    replay()
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleave(replays: dict[str, Replay], rounds: int, clock: Callable[[Replay], float]) -> dict[str, list[float]]:
    """Time each replay once per round. The order changes with the round but is the same in every run."""
    seconds: dict[str, list[float]] = {name: [] for name in replays}
    order, shuffle = list(replays), random.Random(SEED)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            seconds[name].append(clock(replays[name]))
    return seconds


def summarise(seconds: Sequence[float], copy_seconds: Sequence[float], n_bytes: int) -> Timing:
    """Return the timing of one implementation. `copy_seconds` are those of the plain copy in the same rounds."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    share = statistics.median(copy / own for copy, own in zip(copy_seconds, seconds, strict=True))
    return Timing(list(seconds), median, low, high, n_bytes / median / 1e9, share)


def measure(configuration: Configuration, implementations: Sequence[Implementation], bench: Bench) -> list[Row]:
    """Check and time every implementation, and the copy, on one configuration.

    Returns:
        One row each. Its `measured` has the errors and bounds from `norm_checks.Verdict`. If nothing was wrong, it also
        has the figures of `Timing` and `n_copies`, the number of copies of the inputs.
    """
    case, n_bytes = configuration.case, configuration.moved_bytes
    n_copies = copies_for(n_bytes, bench.l2_bytes)
    n_cycles = math.ceil(CALLS / n_copies)
    inputs = [random_inputs(configuration, bench.device, seed) for seed in range(n_copies)]
    source = source_digest()

    def new_row(library: str, note: str) -> Row:
        dtype, shape = configuration.dtype, (configuration.n_cols, configuration.n_rows)
        return Row(bench.machine, dtype, dtype, *shape, case.name, library, source, n_bytes, note, measured={})

    rows = {COPY: new_row(COPY, "")}
    replays = {COPY: bench.record([copy_work(n_bytes, bench.device) for _ in inputs], n_cycles)}
    for implementation in implementations:
        row = rows[implementation.name] = new_row(implementation.name, implementation.note(case))
        # Any error from a peer, such as an unsupported width or too many registers, goes into its row.
        try:
            verdict = check(implementation, configuration, inputs[0])
            row.measured, row.error = {"errors": verdict.errors, "bounds": verdict.bounds}, verdict.fault
            if row.error is None:
                works = [implementation.prepare(case, given) for given in inputs]
                replays[implementation.name] = bench.record(works, n_cycles)
        except Exception as error:
            row.error = notes(type(error).__name__, next(iter(str(error).splitlines()), ""))
    n_calls = n_cycles * n_copies
    seconds = {
        name: [replay / n_calls for replay in own]
        for name, own in interleave(replays, bench.rounds, bench.clock).items()
    }
    for name, own in seconds.items():
        timing = dataclasses.asdict(summarise(own, seconds[COPY], n_bytes))
        rows[name].measured = (rows[name].measured or {}) | {"n_copies": n_copies} | timing
    return list(rows.values())

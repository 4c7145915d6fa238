"""Times the implementations of a configuration on a GPU, in turn, each from cold inputs and beside a plain copy."""

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

CACHE_MULTIPLE = 4  # of the L2 cache that the copies of the inputs fill together
CALLS = 20  # at least, in one graph: what a replay itself costs is then small beside them
COPY = "copy"

Replay = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """How long a call took, in seconds; `low` and `high` are the quartiles over the rounds."""

    seconds: list[float]
    median: float
    low: float
    high: float
    gb_per_s: float
    share_of_copy: float


@dataclass(frozen=True)
class Bench:
    """What measuring depends on, apart from what is measured.

    Attributes:
        machine: Name of the GPU.
        device: Where the tensors are.
        l2_bytes: Size of the cache that must stay cold.
        rounds: How often each implementation takes its turn.
        record: Makes, of works to run in turn and how many times over, something that replays them all.
        clock: The seconds that one replay takes.
    """

    machine: str
    device: torch.device
    l2_bytes: int
    rounds: int
    record: Callable[[Sequence[Work], int], Replay]
    clock: Callable[[Replay], float]


def copies_for(bytes_per_call: int, l2_bytes: int) -> int:
    """How many copies of the inputs to take in turn, so that they fill the cache `CACHE_MULTIPLE` times."""
    return max(2, math.ceil(CACHE_MULTIPLE * l2_bytes / bytes_per_call))


def copy_work(n_bytes: int, device: torch.device) -> Work:
    """A plain copy that moves `n_bytes`: it reads half of them and writes the other half."""
    source = torch.zeros(n_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Work(lambda: {"copy": target.copy_(source)})


def record_graph(works: Sequence[Work], n_cycles: int) -> Replay:
    """Record the works in turn, over and over, in one CUDA graph; on the stream that prepared them."""
    for work in works:  # compiles and tunes whatever has not been
        work.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # A call's results stay until its turn comes again, so that the calls before that write elsewhere.
    results: list[Results] = [{} for _ in works]
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(n_cycles):
            for i, work in enumerate(works):
                results[i] = {}
                results[i] = work.run()

    def replay() -> Sequence[Work]:
        graph.replay()
        return works  # the graph reads their memory, so they have to live as long

    return replay


def gpu_seconds(replay: Replay) -> float:
    """The time of a replay by the GPU's clock, after one that is not timed.

    While that one runs the other is launched, so that its launch is no part of its time.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    replay()
    start.record()
    replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleave(replays: dict[str, Replay], rounds: int, clock: Callable[[Replay], float]) -> dict[str, list[float]]:
    """Time each of them once a round, in an order that changes with the round, the same in every run."""
    seconds: dict[str, list[float]] = {name: [] for name in replays}
    order, shuffle = list(replays), random.Random(SEED)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            seconds[name].append(clock(replays[name]))
    return seconds


def summarise(seconds: Sequence[float], copy_seconds: Sequence[float], n_bytes: int) -> Timing:
    """The timing of one implementation; `copy_seconds` are of the copy of as many bytes, in the same rounds."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    share = statistics.median(copy / own for copy, own in zip(copy_seconds, seconds, strict=True))
    return Timing(list(seconds), median, low, high, n_bytes / median / 1e9, share)


def measure(configuration: Configuration, implementations: Sequence[Implementation], bench: Bench) -> list[Row]:
    """Check and time every implementation, and the copy, on one configuration.

    Returns:
        A row for each. Its `measured` has what `norm_checks.Verdict` says of the errors and, where nothing was wrong,
        `Timing`'s figures and `n_copies` of the inputs, taken in turn.
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
        # Whatever a peer raises, an unsupported width or too many registers, belongs in its row.
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

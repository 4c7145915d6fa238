"""Show where a step's time goes, by kind of operation: norm tuning by peft and by fastln, exact and in 8 bits.

    python scripts/step_anatomy.py BertForMaskedLM:8x128 --dtype bfloat16

*Measured* with torch's profiler in one process, with the methods taking turns. Each operation's own time (without
operations inside it) is summed by kind, as the mean over the steps. A backward operation counts with the forward
operation that recorded it. A fused operation counts under its last kind: dropout and residual before a norm count as
norms, dropout inside attention as attention. `between` is time outside any operation, in Python. The profiler adds some
microseconds to each operation; the last line is the step without the profiler.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from fastln.families.heads import find_heads
from fastln.machine import cpu_model
from fastln.models.shapes import make_shape
from fastln.rates import DTYPES
from fastln.training.optimizer import MasterAdamW
from fastln.training.tasks import apply_method

# In order of precedence: an operation's kind is the first whose pattern matches it or an operation around it.
KINDS = {
    "head": r"cross_entropy|log_softmax|nll_loss|LinearCrossEntropy",
    "dropout": r"[Dd]ropout|bernoulli",
    "attention": r"[Aa]ttention|bmm|::_?(safe_)?softmax",
    "norms": r"(layer|rms)_norm|EagerNorm|fastln::norm",
    "activations": r"gelu|silu|relu|tanh|sigmoid|Activation",
    "linears": r"[Ll]inear|mm$|conv",
}
PRODUCTS = re.compile(r"[Ll]inear|mm$")
SPLIT = ("linears", "attention")  # forward and backward are separate rows
ROWS = (
    *(f"{kind}, {phase}" for kind in SPLIT for phase in ("forward", "backward")),
    *("norms", "activations", "dropout", "head", "optimizer", "other", "between"),
)


def kind_of(chain: list[Any], n_classes: int | None) -> str:
    """Return the kind of an operation of the forward pass.

    Args:
        chain: The operation's event and the events around it, innermost first.
        n_classes: The number of classes of the language-model head, which identifies its product; None without a head.
    """
    if n_classes and any(PRODUCTS.search(e.name) and n_classes in _sizes(e) for e in chain):
        return "head"
    for kind, pattern in KINDS.items():
        if any(re.search(pattern, event.name) for event in chain):
            return kind
    return "other"


def _sizes(event: Any) -> set[int]:
    return {size for shape in event.input_shapes or () if isinstance(shape, list) for size in shape}


def sort(events: Iterable[Any], n_classes: int | None) -> Counter[str]:
    """Return microseconds by row of the table.

    Args:
        events: Events in the ranges `forward`, `backward` and `optimizer`, in the order of their start.
        n_classes: As for `kind_of`.
    """
    times: Counter[str] = Counter()
    recorded: dict[int, str] = {}  # kind of each operation with an autograd node, by the sequence number of the node
    for event in events:
        chain = [event]
        while chain[-1].cpu_parent is not None:
            chain.append(chain[-1].cpu_parent)
        phase = chain.pop().name
        if not chain:
            row = "between"
        elif phase == "optimizer":
            row = phase
        else:
            if phase == "backward":
                node = next((e for e in reversed(chain) if e.sequence_nr >= 0), None)
                row = recorded.get(node.sequence_nr, "other") if node else "other"
            else:
                # Several operations can share a number. The node belongs to the last of them.
                row = recorded[event.sequence_nr] = kind_of(chain, n_classes)
            row = f"{row}, {phase}" if row in SPLIT else row
        times[row] += event.self_cpu_time_total
    return times


class Subject:
    """A prepared model that runs training steps.

    Args:
        pair: METHOD/ENGINE or METHOD/ENGINE/PRODUCTS.
        shape: CLASS:BATCHxSIZE[:LAYERS], see `fastln.models.shapes`.
        dtype: The model's dtype.
    """

    def __init__(self, pair: str, shape: str, dtype: torch.dtype) -> None:
        task = make_shape(shape, dtype=dtype)
        method, engine, products = (*pair.split("/"), "exact")[:3]
        heads: list[nn.Linear] = list(find_heads(task.model).values())
        self.n_classes = heads[0].out_features if heads else None
        self.model = apply_method(task, method, engine, products=products).train()
        self.batch = task.batch
        self.optimizer = MasterAdamW(p for p in self.model.parameters() if p.requires_grad)
        self.times: Counter[str] = Counter()
        self.seconds: list[float] = []

    def step(self, record: Callable[[str], Any] = lambda name: nullcontext()) -> None:
        """Run a step. `record` opens a range around each phase."""
        with record("forward"):
            loss = self.model(**self.batch).loss
        with record("backward"):
            loss.backward()
        with record("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()

    def measure(self) -> None:
        """Run one step with the profiler and one without."""
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
            self.step(record_function)
        events = sorted(found.events(), key=lambda event: event.time_range.start)
        self.times += sort((e for e in events if _inside(e)), self.n_classes)
        start = time.perf_counter()
        self.step()
        self.seconds.append(time.perf_counter() - start)


def _inside(event: Any) -> bool:
    while event.cpu_parent is not None:
        event = event.cpu_parent
    return event.name in ("forward", "backward", "optimizer")


def table(subjects: dict[str, Subject], steps: int) -> str:
    """Render milliseconds per step and shares, in Markdown."""
    lines = [f"| | {' | '.join(f'{name}, ms (share)' for name in subjects)} |", f"|---|{'---:|' * len(subjects)}"]
    totals = {name: sum(subject.times.values()) for name, subject in subjects.items()}
    for row in ROWS:
        cells = [
            f"{subject.times[row] / steps / 1e3:.1f} ({100 * subject.times[row] / totals[name]:.1f}%)"
            for name, subject in subjects.items()
        ]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    lines.append(f"| all | {' | '.join(f'{total / steps / 1e3:.0f}' for total in totals.values())} |")
    plain = (f"{1e3 * median(subject.seconds):.0f}" for subject in subjects.values())
    lines.append(f"| not profiled, median | {' | '.join(plain)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", help="CLASS:BATCHxSIZE[:LAYERS]")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--steps", type=int, default=10)
    usual = ["layernorm/peft", "layernorm/fastln", "layernorm/fastln/int8"]
    parser.add_argument("--methods", nargs="+", default=usual, metavar="METHOD/ENGINE[/PRODUCTS]")
    options = parser.parse_args()
    subjects = {pair: Subject(pair, options.shape, DTYPES[options.dtype]) for pair in options.methods}
    for subject in (*subjects.values(), *subjects.values()):  # the second finds what the first has learnt
        subject.step()
    for _ in range(options.steps):
        for subject in subjects.values():
            subject.measure()
    command = shlex.join(["python", "scripts/step_anatomy.py", *sys.argv[1:]])
    print(
        f"*Measured*, {options.shape} in {options.dtype} on {cpu_model()}, {torch.get_num_threads()} threads, ", end=""
    )
    print(f"torch {torch.__version__}: the mean of {options.steps} steps. Command: `{command}`\n")
    print(table(subjects, options.steps))


if __name__ == "__main__":
    main()

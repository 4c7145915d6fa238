"""What late rows gain: training steps of one model with them and without, taking turns.

    python scripts/late_rows_gain.py --dtype bfloat16

*Measured* in one process. Of each shape there are two copies with the same weights and the same batch: one prepared by
`fastln.prepare(model)`, one by `fastln.prepare(model, without=("late_rows",))`. A step is forward, backward, optimizer
and zero_grad. The copies take turns, and who begins changes with every pair, so that a slow moment of the machine
hits both. The gain is that of each pair, 1 - (with / without): the table has its median and its range.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import dataclass, field
from statistics import median

import torch

import fastln
from fastln.machine import cpu_model
from fastln.models.shapes import make_shape
from fastln.rates import DTYPES
from fastln.training.optimizer import MasterAdamW

SHAPES = ("ViTForImageClassification:8x224", "BertForMaskedLM:8x128", "LlamaForCausalLM:2x640:8")


class Trainee:
    """A prepared model that takes timed steps.

    Args:
        shape: CLASS:BATCHxSIZE[:LAYERS], see `fastln.models.shapes`.
        dtype: Of the model.
        device: Where it trains.
        products: As `fastln.prepare` takes it.
        without: Likewise.
    """

    def __init__(
        self, shape: str, dtype: torch.dtype, device: torch.device, products: str, without: tuple[str, ...]
    ) -> None:
        task = make_shape(shape, dtype=dtype, device=device)
        self.model = fastln.prepare(task.model.train(), products=products, without=without)
        self.batch, self.device = task.batch, device
        self.optimizer = MasterAdamW(p for p in self.model.parameters() if p.requires_grad)
        self.seconds: list[float] = []

    def step(self) -> None:
        """Take a step and note its seconds."""
        self._wait()
        start = time.perf_counter()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()
        self.seconds.append(time.perf_counter() - start)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class Gain:
    """Seconds of the steps of one shape, pair by pair."""

    shape: str
    late: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def row(self) -> str:
        """Return a line of the table."""
        gains = [100 * (1 - late / whole) for late, whole in zip(self.late, self.whole, strict=True)]
        times = (f"{1e3 * median(x):.0f} ({1e3 * min(x):.0f} to {1e3 * max(x):.0f})" for x in (self.late, self.whole))
        gain = f"{median(gains):.1f}% ({min(gains):.1f}% to {max(gains):.1f}%)"
        return f"| {self.shape} | {' | '.join(times)} | {gain} |"


def measure(shape: str, options: argparse.Namespace) -> Gain:
    """Take the steps of one shape."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    late, whole = (Trainee(shape, dtype, device, options.products, without) for without in ((), ("late_rows",)))
    for pair in range(options.warmup + options.steps):
        for trainee in (late, whole) if pair % 2 else (whole, late):
            trainee.step()
    return Gain(shape, late.seconds[options.warmup :], whole.seconds[options.warmup :])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shapes", nargs="*", default=SHAPES, help="CLASS:BATCHxSIZE[:LAYERS]")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--products", default="exact", help="as fastln.prepare takes it")
    parser.add_argument("--steps", type=int, default=20, help="pairs of steps that count")
    parser.add_argument("--warmup", type=int, default=2, help="pairs of steps before them")
    options = parser.parse_args()
    name = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else cpu_model()
    command = shlex.join(["python", "scripts/late_rows_gain.py", *sys.argv[1:]])
    print(
        f"*Measured* in {options.dtype}, {options.products} products, on {name}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}: medians (ranges) of {options.steps} pairs of steps. Command: `{command}`\n"
    )
    print("| shape | late rows, ms | all rows, ms | gain |\n|---|---:|---:|---:|")
    for shape in options.shapes:
        print(measure(shape, options).row(), flush=True)


if __name__ == "__main__":
    main()

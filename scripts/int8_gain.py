"""Time steps of norm tuning in 8 bits beside exact ones and peft's, in the faster of peft's dtypes.

    python scripts/int8_gain.py BertForMaskedLM:8x128 --rounds 5
    ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 MKL_ENABLE_INSTRUCTIONS=AVX512 python scripts/int8_gain.py ...

*Measured* in one process; the subjects take turns, two steps each, of which the second counts. Ratios are paired: in
each round the time of the other over ours, as the median and the range over the rounds. The second command stands for
an Intel processor without matrix units: it keeps oneDNN and MKL from using those of a newer one. The share is that of
the floor: the products of frozen layers at the rate of 8-bit units and all others at that of the fastest float units,
both measured here.
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median

import torch

from fastln.cost import count_operations
from fastln.engines import put_method
from fastln.machine import cpu_model
from fastln.models.shapes import make_shape
from fastln.rates import floor_rate, int8_product_rate
from fastln.training.optimizer import MasterAdamW

CPU = torch.device("cpu")
PEERS = {"peft's norms": "layernorm", "LoRA": "lora"}


class Subject:
    """A model that runs training steps.

    Args:
        shape: CLASS:BATCHxSIZE[:LAYERS], see `fastln.models.shapes`.
        method: The tuning method.
        engine: Who puts it on the model.
        dtype: The model's dtype.
        products: The form of its products.
    """

    def __init__(self, shape: str, method: str, engine: str, dtype: torch.dtype, products: str = "exact") -> None:
        torch.manual_seed(0)
        task = make_shape(shape, dtype=dtype)
        self.model = put_method(task.model, method, engine, products=products).train()
        self.batch = task.batch
        self.optimizer = MasterAdamW(p for p in self.model.parameters() if p.requires_grad)
        self.seconds: list[float] = []

    def step(self) -> None:
        """Run one step and note its time."""
        start = time.perf_counter()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    """Print one line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", help="CLASS:BATCHxSIZE[:LAYERS]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lora", action="store_true", help="also time LoRA")
    given = parser.parse_args()
    torch.set_flush_denormal(True)  # as fastln bench does
    limits = [
        f"{name}={os.environ[name]}" for name in ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS") if name in os.environ
    ]
    print(f"{cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}", *limits, sep="; ")
    bf16_rate, int8_rate = floor_rate(CPU, torch.bfloat16), int8_product_rate(CPU)
    print(
        "| shape | 8 bits, s (share of the floor) | exact, s | over exact | over peft's norms | its dtype | over LoRA |"
    )
    print("|---|---|---|---|---|---|---|")
    for shape in given.shapes:
        print(
            _line(shape, given.rounds, bf16_rate, int8_rate, PEERS if given.lora else {"peft's norms": "layernorm"}),
            flush=True,
        )


def _line(shape: str, rounds: int, bf16_rate: float, int8_rate: float | None, peers: dict[str, str]) -> str:
    ours = {p: Subject(shape, "layernorm", "fastln", torch.bfloat16, p) for p in ("int8", "exact")}
    faster, dtype = _faster(shape)
    others = {name: Subject(shape, method, "peft", dtype) for name, method in peers.items() if method != "layernorm"}
    others["peft's norms"] = faster
    subjects = [*ours.values(), *others.values()]
    for subject in subjects:
        subject.step()
        subject.step()
        subject.seconds.clear()
    for _ in range(rounds):
        for subject in subjects:
            subject.step()
            subject.seconds.pop()  # not timed: memory and caches are those that the subject before has left
            subject.step()
    counted = count_operations(put_method(make_shape(shape).model, "layernorm", "torch").train(), ours["int8"].batch)
    floor = (counted.all - counted.in_linears) / bf16_rate + counted.in_linears / (int8_rate or bf16_rate)
    mine = ours["int8"].seconds
    cells = [
        shape,
        f"{median(mine):.3g} ({100 * floor / median(mine):.0f}%)",
        f"{median(ours['exact'].seconds):.3g}",
        _ratio(ours["exact"].seconds, mine),
        _ratio(faster.seconds, mine),
        str(dtype).removeprefix("torch."),
        _ratio(others["LoRA"].seconds, mine) if "LoRA" in others else "-",
    ]
    return f"| {' | '.join(cells)} |"


def _faster(shape: str) -> tuple[Subject, torch.dtype]:
    """Return peft's norm tuning in the dtype in which its step is faster."""
    tried = {}
    for dtype in (torch.bfloat16, torch.float32):
        subject = Subject(shape, "layernorm", "peft", dtype)
        subject.step()
        subject.step()
        tried[dtype] = subject
    dtype = min(tried, key=lambda dtype: tried[dtype].seconds[-1])
    return tried[dtype], dtype


def _ratio(theirs: list[float], mine: list[float]) -> str:
    ratios = [a / b for a, b in zip(theirs, mine, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


if __name__ == "__main__":
    main()

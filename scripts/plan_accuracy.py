"""Compare the predicted peak of a training step with what torch's CPU allocator measures, on models of real size.

    python scripts/plan_accuracy.py                  # writes benchmarks/results/plan.json and prints the table
    python scripts/plan_accuracy.py --only ViT int8  # only combinations whose words contain all of these

Each combination runs in a process of its own, with random weights. *Predicted* is `fastln.peak.step_memory` on the meta
device, before the model is made. *Measured* is the most that torch's allocator had handed out at once during the steps
after the first, from the weights on, and the median seconds of a step. On the meta device no tensor waits, so late
logits and late rows are left out of both. Steps are `model(**batch).loss.backward()` and AdamW.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastln.bench.provenance import settle
from fastln.engines import put_method
from fastln.memory import AllocatorPeak
from fastln.models.shapes import FAMILIES, Family, text_family
from fastln.peak import step_memory
from fastln.training.optimizer import MasterAdamW

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "plan.json"
_SMOL = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
MODELS = FAMILIES | {"SmolLM2-135M": text_family("LlamaForCausalLM", _SMOL | {"tie_word_embeddings": True}, 49152, 30)}
NAMES = {
    "ViTForImageClassification": "ViT-B/16",
    "BertForMaskedLM": "BERT-base",
    "BlipForQuestionAnswering": "BLIP-VQA",
    "LlamaForCausalLM": "Llama, 8 layers of 1,024",
}
LATE = ("late_logits", "late_rows")
STEPS = 3


class Combination(NamedTuple):
    """What is compared.

    Attributes:
        model: A name from `MODELS`.
        batch_size: The samples of a batch.
        size: Of a sample: tokens, or pixels of an edge.
        method: A tuning method.
        engine: Who runs it.
        dtype: Of weights and images.
        activations: What fastln's operations keep for backward.
        products: In what form products run.
    """

    model: str
    batch_size: int
    size: int
    method: str
    engine: str
    dtype: str
    activations: str = "exact"
    products: str = "exact"

    @property
    def words(self) -> str:
        """All of it, to choose by."""
        return " ".join(map(str, (*self, NAMES.get(self.model, ""))))


def combinations() -> Iterator[Combination]:
    """Yield what is compared by default."""
    for model, n, size in (
        ("ViTForImageClassification", 8, 224),
        ("BertForMaskedLM", 8, 128),
        ("BlipForQuestionAnswering", 2, 480),
        ("SmolLM2-135M", 2, 512),
        ("LlamaForCausalLM", 2, 640),
    ):
        for method, engine, dtype, products in (
            ("layernorm", "fastln", "float32", "exact"),
            ("layernorm", "fastln", "bfloat16", "exact"),
            ("layernorm", "fastln", "bfloat16", "int8"),
            ("layernorm", "torch", "bfloat16", "exact"),
            ("lora", "peft", "float32", "exact"),
            ("full", "torch", "float32", "exact"),
        ):
            yield Combination(model, n, size, method, engine, dtype, products=products)


def put(model: nn.Module, one: Combination) -> nn.Module:
    settings: dict[str, Any] = {}
    if one.engine == "fastln":
        settings = {"activations": one.activations, "products": one.products, "without": LATE}
    return put_method(model.to(getattr(torch, one.dtype)).train(), one.method, one.engine, **settings)


def batch_of(family: Family, one: Combination) -> dict[str, Tensor]:
    batch = family.batch(one.batch_size, one.size)
    dtype = getattr(torch, one.dtype)
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}


def compare(one: Combination, n_steps: int) -> dict[str, Any]:
    """Predict and measure one combination, in this process."""
    family = MODELS[one.model]
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    start = time.perf_counter()
    with torch.device("meta"):
        on_paper = family.make(one.size, family.n_layers)
    predicted = step_memory(put(on_paper, one), batch_of(family, one))
    seconds_to_predict = time.perf_counter() - start
    gc.collect()
    seconds = []
    with AllocatorPeak() as allocated:
        model, batch = put(family.make(one.size, family.n_layers), one), batch_of(family, one)
        optimizer = MasterAdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
        for step in range(1 + n_steps):
            if step == 1:
                gc.collect()
                allocated.reset()
            start = time.perf_counter()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
    return one._asdict() | {
        "predicted_peak_bytes": predicted.peak,
        "measured_peak_bytes": allocated.bytes,
        "memory_kind": allocated.kind,
        "predicted": {
            "weights": predicted.weights,
            "gradients": predicted.gradients,
            "optimizer": predicted.optimizer,
            "batch": predicted.batch,
            "saved": predicted.saved_bytes,
            "workspace": predicted.workspace,
            "phase": predicted.phase,
        },
        "seconds_to_predict": seconds_to_predict,
        "step_seconds": median(seconds[1:]),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Render the rows in Markdown."""
    lines = [
        "| model | method | engine | dtype | activations | products | predicted MiB | measured MiB | error | step s |",
        "|---|---|---|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        predicted, measured = row["predicted_peak_bytes"], row["measured_peak_bytes"]
        name = f"{NAMES.get(row['model'], row['model'])}, {row['batch_size']}×{row['size']}"
        settings = " | ".join(row[key] for key in ("method", "engine", "dtype", "activations", "products"))
        sizes = f"{predicted / 2**20:,.0f} | {measured / 2**20:,.0f} | {predicted / measured - 1:+.1%}"
        lines.append(f"| {name} | {settings} | {sizes} | {row['step_seconds']:.2f} |")
    return "\n".join(lines)


def _in_processes_of_their_own(chosen: Iterable[Combination], n_steps: int) -> Iterator[dict[str, Any]]:
    for one in chosen:
        command = [sys.executable, __file__, "--steps", str(n_steps), "--one", json.dumps(one)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"failed (exit status {done.returncode}): {one.words}", file=sys.stderr)
            continue
        yield json.loads(done.stdout.splitlines()[-1])
        print(table([json.loads(done.stdout.splitlines()[-1])]).splitlines()[-1], file=sys.stderr)


def main() -> None:
    """Compare, write the rows and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file for the rows")
    parser.add_argument("--only", nargs="*", default=(), help="words that a combination must contain")
    parser.add_argument("--steps", type=int, default=STEPS, help="measured steps, after one that is not")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(compare(Combination(*json.loads(options.one)), options.steps)))
        return
    chosen = [one for one in combinations() if all(word in one.words for word in options.only)]
    rows = list(_in_processes_of_their_own(chosen, options.steps))
    report = {"provenance": settle("cpu", "float32")[2] | {"argv": sys.argv}, "rows": rows}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))
    if len(rows) < len(chosen):
        raise SystemExit(f"{len(chosen) - len(rows)} of {len(chosen)} combinations failed")


if __name__ == "__main__":
    main()

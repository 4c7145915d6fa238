"""Compare the gradients of all norms in 8 bits, and in bfloat16, with those in float32: cosines, and losses.

    FASTLN_DATA=DIR python scripts/gradient_cosines.py --smollm2 DIR

Each model is loaded in float32 and in bfloat16, and prepared to train its norms with exact products and with products
in 8 bits. All see the same batches, with dropout off. The exact gradients in float32 are what the others are compared
with. A row for each model and form is written to benchmarks/results/cosines.json, where rows of other models stay.

With `--storage` the forms are the storage modes that round what they keep, in float32, and the rows are written to
benchmarks/results/storage_cosines.json.

- `dual`: DINOv2-small and all-MiniLM-L6-v2 on images and questions of VQA-RAD, under a random head. FASTLN_DATA names
  the folder of both, and of the reports.
- `smollm2`: SmolLM2-135M on the longest reports of IU X-ray, findings in and impression out, through its chat template,
  with labels on every token. `smollm2-answers`: the same with labels on the impressions alone, as in training.
- `blip`: BLIP-VQA at random weights, on random images and words.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from impressions import reports
from torch import Tensor, nn

import fastln
from fastln.bench.provenance import settle
from fastln.data import VQADataset, load_dataset
from fastln.methods import norm_parameters
from fastln.models import load_task
from fastln.models.shapes import make_shape
from fastln.models.task import Task, VQATask
from fastln.ops.settings import STORAGES
from fastln.state import prepared

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "cosines.json"
STORAGE_RESULTS = RESULTS.with_name("storage_cosines.json")
FORMS = {
    "bfloat16, exact": (torch.bfloat16, {}),
    "bfloat16, int8": (torch.bfloat16, {"products": "int8"}),
    "float32, int8": (torch.float32, {"products": "int8"}),
}
STORAGE_FORMS = {
    mode: (torch.float32, {"activations": mode}) for mode, storage in STORAGES.items() if storage.x_hat_bits
} | {"int8, compressed-again": (torch.float32, {"activations": "compressed-again", "products": "int8"})}
NAMES = {
    "dual": "DINOv2-S and MiniLM, VQA-RAD",
    "smollm2-answers": "SmolLM2-135M, reports, labels on answers",
    "smollm2": "SmolLM2-135M, reports, labels on all tokens",
    "blip": "BLIP-VQA, random weights",
}
Batch = dict[str, Any]
Subject = Callable[[torch.dtype], tuple[Task, list[Batch]]]
Gradients = dict[str, Tensor]


def towers(options: argparse.Namespace) -> Subject:
    """Return what makes the dual encoder and its batches."""
    root = Path(os.environ["FASTLN_DATA"])
    data = load_dataset(str(root / "data" / "vqa-rad"), "train")
    spec = f"dual:{root}/models/dinov2-small,{root}/models/all-MiniLM-L6-v2"
    # One question about each image, so that the images differ.
    samples = list({sample.image: sample for sample in data.samples}.values())[: options.samples]
    return lambda dtype: _with_batches(load_task(spec, data, dtype=dtype), data, samples, 16)


def smollm2(options: argparse.Namespace, *, all_tokens: bool) -> Subject:
    """Return what makes SmolLM2 and its batches: the reports with the longest findings."""
    data = reports(Path(os.environ["FASTLN_DATA"]) / "data" / "iu-xray-reports", "train")
    samples = sorted(data.samples, key=lambda sample: -len(sample.question))[: options.samples]

    def make(dtype: torch.dtype) -> tuple[Task, list[Batch]]:
        task, batches = _with_batches(load_task(f"chat:{options.smollm2}", data, dtype=dtype), data, samples, 4)
        if all_tokens:
            for batch in batches:
                batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return task, batches

    return make


def blip(options: argparse.Namespace) -> Subject:
    """Return what makes BLIP-VQA and its batch."""

    def make(dtype: torch.dtype) -> tuple[Task, list[Batch]]:
        task = make_shape("BlipForQuestionAnswering:2x480", dtype=dtype)
        return task, [task.batch]

    return make


def _with_batches(task: VQATask, data: VQADataset, samples: list[Any], n: int) -> tuple[Task, list[Batch]]:
    return task, [task.collate(samples[start : start + n], data) for start in range(0, len(samples), n)]


SUBJECTS: dict[str, Callable[[argparse.Namespace], Subject]] = {
    "dual": towers,
    "smollm2-answers": lambda options: smollm2(options, all_tokens=False),
    "smollm2": lambda options: smollm2(options, all_tokens=True),
    "blip": blip,
}


def gradients(model: nn.Module, batches: Sequence[Batch]) -> tuple[Gradients, float]:
    """Return the gradient of each norm's parameters, summed over batches, and the mean loss."""
    model.eval()
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
    norms = {name: model.get_parameter(name).grad for name in norm_parameters(model)}
    return {name: grad.double().flatten() for name, grad in norms.items() if grad is not None}, sum(losses) / len(
        losses
    )


def cosine(a: Tensor, b: Tensor) -> float:
    """Return the cosine of two vectors, however short they are; 0 if one is zero. torch's takes 1e-8 for less."""
    lengths = a.norm() * b.norm()
    return (a @ b / lengths).item() if lengths else 0.0


def compare(found: Gradients, exact: Gradients) -> dict[str, Any]:
    """Return the cosine of all gradients together, and the median and the lowest of the parameters'.

    A parameter whose exact gradient is zero has no direction and is left out.
    """
    names = [name for name, grad in exact.items() if grad.any()]
    each = {name: cosine(found[name], exact[name]) for name in names}
    worst = min(each, key=each.__getitem__)
    got, want = (torch.cat([grads[name] for name in names]) for grads in (found, exact))
    return {
        "together": cosine(got, want),
        "median": torch.tensor(list(each.values())).median().item(),
        "worst": each[worst],
        "worst_norm": worst,
        "each": each,
    }


def measure(name: str, subject: Subject, forms: Mapping[str, Any] = FORMS) -> Iterator[dict[str, Any]]:
    """Yield a row for each form of a model."""
    task, batches = subject(torch.float32)
    exact, exact_loss = gradients(fastln.prepare(task.model), batches)
    for form, (dtype, arguments) in forms.items():
        task, batches = subject(dtype)
        model = fastln.prepare(task.model, **arguments)
        found, loss = gradients(model, batches)
        yield {
            "model": name,
            "form": form,
            "samples": sum(len(batch["labels"]) for batch in batches),
            "tokens": sum(batch["input_ids"].numel() for batch in batches),
            "loss": loss,
            "exact_loss": exact_loss,
            **layers(model),
            **compare(found, exact),
        }


def layers(model: nn.Module) -> dict[str, int]:
    """Count the layers in 8 bits, and those of them that are turned, and that are in two terms."""
    state = prepared(model)
    assert state is not None
    specs = [change.detail for change in state.plan.changes if change.stand_in in ("int8_linear", "int8_conv1d")]
    return {"in_8_bits": len(specs)} | {
        name: sum(getattr(spec, name) for spec in specs) for name in ("turned", "twice")
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Render the rows in Markdown."""
    lines = [
        "| model | form | layers in 8 bits (turned, in two terms) | together | median | worst norm "
        "| loss (exact in float32) |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        n_layers = f"{row['in_8_bits']} ({row['turned']}, {row['twice']})" if row["in_8_bits"] else "–"
        cosines = " | ".join(f"{row[name]:.4f}" for name in ("together", "median", "worst"))
        losses = f"{row['loss']:.4f} ({row['exact_loss']:.4f})"
        lines.append(f"| {NAMES[row['model']]} | {row['form']} | {n_layers} | {cosines} | {losses} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, write the rows and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--smollm2", type=Path, help="the folder of SmolLM2-135M")
    parser.add_argument("--samples", type=int, default=32, help="reports, and pairs of image and question")
    parser.add_argument("--storage", action="store_true", help="compare storage modes instead of products")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    options = parser.parse_args()
    forms = STORAGE_FORMS if options.storage else FORMS
    options.out = options.out or (STORAGE_RESULTS if options.storage else RESULTS)
    for name in options.models:
        provenance = settle("cpu", "bfloat16")[2] | {"started": datetime.now(UTC).isoformat(timespec="seconds")}
        provenance["argv"] = ["python", *sys.argv]
        others = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else []
        rows = [row for row in others if row["model"] != name]
        rows += [row | {"provenance": provenance} for row in measure(name, SUBJECTS[name](options), forms)]
        rows.sort(key=lambda row: list(SUBJECTS).index(row["model"]))
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()

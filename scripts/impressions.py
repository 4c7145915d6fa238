"""Train a small language model to write the impression of a radiology report from its findings, exact beside 8 bits.

    python scripts/impressions.py --reports DIR --model chat:DIR

The reports are those of IU X-ray (`indiana_reports.csv`). Each products mode gets the same seeds, batches and learning
rate. After the training the impressions of the test reports are scored: the mean loss of a token, and ROUGE-L of what
the model writes. Two marks stand beside: the model before training, and the commonest impression of the training
reports as the answer to everything. Rows go to benchmarks/results/impressions.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from fastln.bench.provenance import settle
from fastln.data import VQADataset, load_dataset
from fastln.metrics import score
from fastln.models import load_task
from fastln.models.task import VQATask
from fastln.training import TrainConfig, train_task
from fastln.training.evaluate import evaluating, predict

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "impressions.json"
QUESTION = "Write the impression of this radiology report. Findings: "
SHORTEST = {"findings": 30, "impression": 5}
SPLITS = ("test", "validation", *["train"] * 8)
"""The split of a report, by the last digit of its number."""

Row = dict[str, Any]


def reports(folder: Path, split: str) -> VQADataset:
    """Return the reports of a split as questions and answers, without those that lack findings or impression."""
    with (folder / "indiana_reports.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(len(row[key]) > n for key, n in SHORTEST.items())]
    with tempfile.TemporaryDirectory() as scratch:
        for name in dict.fromkeys(SPLITS):
            lines = [
                {"id": row["uid"], "question": QUESTION + row["findings"], "answer": row["impression"]}
                for row in rows
                if SPLITS[int(row["uid"]) % len(SPLITS)] == name
            ]
            Path(scratch, f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        return load_dataset(scratch, split)


def scores(task: VQATask, data: VQADataset, n_together: int) -> Row:
    """Return the mean loss of an impression's token, and ROUGE-L of the impressions that the model writes."""
    total, count = 0.0, 0
    with evaluating(task.model), torch.no_grad():
        for start in range(0, len(data), n_together):
            batch = task.collate(data.samples[start : start + n_together], data)
            n_labels = int((batch["labels"][:, 1:] != -100).sum())
            total += task.model(**batch).loss.item() * n_labels
            count += n_labels
    return {"loss": total / count, "rouge_l": rouge(predict(task, data, batch_size=n_together), data)}


def rouge(written: Sequence[str], data: VQADataset) -> float:
    """Return the mean ROUGE-L of impressions."""
    return vars_of(score(written, [replace(sample, question="") for sample in data.samples]))["rouge_l"]


def vars_of(scores: Any) -> Row:
    return {name: getattr(scores, name) for name in scores.__slots__}


def run(options: argparse.Namespace, products: str, seed: int) -> Row:
    """Train once, and score."""
    train, test = (reports(options.reports, split) for split in ("train", "test"))
    task = load_task(options.model, train, dtype=torch.bfloat16, seed=seed)
    config = TrainConfig(
        products=products,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=seed,
    )
    result = train_task(task, train, config, progress=False)
    row = {"products": products, "seed": seed, "steps": len(result.losses), "seconds": result.seconds}
    row |= {"train_loss": mean(result.losses[-50:]), **scores(task, test, options.batch_size * 2)}
    print(row, flush=True)
    return row


def marks(options: argparse.Namespace) -> list[Row]:
    """Return the scores of the model before training, and of the commonest impression."""
    train, test = (reports(options.reports, split) for split in ("train", "test"))
    task = load_task(options.model, train, dtype=torch.bfloat16)
    [(commonest, _)] = Counter(sample.answer for sample in train.samples).most_common(1)
    return [
        {"products": "before training", **scores(task, test, options.batch_size * 2)},
        {"products": "the commonest impression", "rouge_l": rouge([commonest] * len(test), test)},
    ]


def table(rows: Iterable[Row]) -> str:
    """Render the rows in Markdown, one line per products mode."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row["products"], []).append(row)
    lines = ["| products | seeds | loss of the last 50 steps | test loss | test ROUGE-L |", "|---|---:|---:|---:|---:|"]
    for products, own in kinds.items():
        n_seeds = str(len(own)) if "seed" in own[0] else "–"
        cells = (_spread(own, name) for name in ("train_loss", "loss", "rouge_l"))
        lines.append(f"| {products} | {n_seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(rows: list[Row], name: str) -> str:
    if name not in rows[0]:
        return "–"
    values = [row[name] for row in rows]
    deviation = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{deviation}"


def main() -> None:
    """Train and score, write the rows and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reports", type=Path, required=True, help="the folder of indiana_reports.csv")
    parser.add_argument("--model", required=True, help="chat:SOURCE")
    parser.add_argument("--products", nargs="+", default=["exact", "int8"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, help="the method's default if left out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file for the rows")
    options = parser.parse_args()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    rows = marks(options)
    rows += [run(options, products, seed) for seed in range(options.seeds) for products in options.products]
    provenance = settle("cpu", "bfloat16")[2] | {"started": started, "argv": sys.argv}
    rows = [row | {"provenance": provenance} for row in rows]
    options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()

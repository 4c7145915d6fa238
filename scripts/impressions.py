"""Train a small language model to write the impression of a radiology report from its findings, exact beside 8 bits.

    python scripts/impressions.py --reports DIR --model chat:DIR [--train N] [--test N]

The reports are those of IU X-ray (`indiana_reports.csv`). Each products mode gets the same seeds, batches and learning
rate. After the training the impressions of the test reports are scored: the mean loss of a token, and ROUGE-L of what
the model writes. Two marks stand beside: the model before training, and the commonest impression of the training
reports as the answer to everything. Each row goes to benchmarks/results/impressions.json as it comes. A run that was
stopped goes on where it was: rows that are there, with the same options, are not measured again.

`python scripts/impressions.py --reports DIR --write DIR` writes the reports as questions and answers, a file for each
split, as `fastln train --data` and `fastln bench --data` take them, and trains nothing.

`--train N` and `--test N` take the first so many reports of a split, so that a run fits into its time.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
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

BEFORE, COMMONEST = "before training", "the commonest impression"
"""The marks beside the trained models, in place of their products."""

Row = dict[str, Any]


def write_reports(folder: Path, out: Path) -> None:
    """Write all reports as questions and answers, a file for each split, without those that lack either."""
    with (folder / "indiana_reports.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if all(len(row[key]) > n for key, n in SHORTEST.items())]
    for name in dict.fromkeys(SPLITS):
        lines = [
            {"id": row["uid"], "question": QUESTION + row["findings"], "answer": row["impression"]}
            for row in rows
            if SPLITS[int(row["uid"]) % len(SPLITS)] == name
        ]
        Path(out, f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def reports(folder: Path, split: str) -> VQADataset:
    """Return the reports of a split as questions and answers."""
    with tempfile.TemporaryDirectory() as scratch:
        write_reports(folder, Path(scratch))
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


def splits(options: argparse.Namespace) -> tuple[VQADataset, VQADataset]:
    """Return the reports to train on and those to score, as many as the options say."""
    train, test = (reports(options.reports, split) for split in ("train", "test"))
    train.samples, test.samples = train.samples[: options.train], test.samples[: options.test]
    return train, test


def run(options: argparse.Namespace, products: str, seed: int) -> Row:
    """Train once, and score."""
    train, test = splits(options)
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
    return row | {"train_loss": mean(result.losses[-50:]), **scores(task, test, options.batch_size * 2)}


def before_training(options: argparse.Namespace) -> Row:
    """Return the scores of the model before training."""
    train, test = splits(options)
    task = load_task(options.model, train, dtype=torch.bfloat16)
    return {"products": BEFORE, **scores(task, test, options.batch_size * 2)}


def commonest_impression(options: argparse.Namespace) -> Row:
    """Return the score of the commonest impression of the training reports as the answer to everything."""
    train, test = splits(options)
    [(commonest, _)] = Counter(sample.answer for sample in train.samples).most_common(1)
    return {"products": COMMONEST, "rouge_l": rouge([commonest] * len(test), test)}


def measurements(options: argparse.Namespace) -> Iterator[tuple[str, int | None, Callable[[], Row]]]:
    """Yield the products mode and the seed of every row, and what measures it, seed by seed."""
    yield COMMONEST, None, lambda: commonest_impression(options)
    yield BEFORE, None, lambda: before_training(options)
    for seed in range(options.seeds):
        for products in options.products:
            yield products, seed, functools.partial(run, options, products, seed)


def settings(options: argparse.Namespace) -> Row:
    """Return what rows of one table have in common."""
    names = ("epochs", "batch_size", "learning_rate", "train", "test")
    return {"model": Path(options.model.partition(":")[2]).name} | {name: getattr(options, name) for name in names}


def measure(options: argparse.Namespace) -> list[Row]:
    """Measure the rows that are not there yet; write each as it comes.

    Raises:
        SystemExit: If the file has rows of other options.
    """
    rows: list[Row] = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else []
    own = settings(options)
    if any(row["settings"] != own for row in rows):
        sys.exit(f"{options.out} has rows of other options: {rows[0]['settings']}, not {own}; name another --out")
    there = {(row["products"], row.get("seed")) for row in rows}
    for products, seed, take in measurements(options):
        if (products, seed) in there:
            continue
        started = datetime.now(UTC).isoformat(timespec="seconds")
        row = take()
        print(row, flush=True)
        provenance = settle("cpu", "bfloat16")[2] | {"started": started, "argv": ["python", *sys.argv]}
        rows.append(row | {"settings": own, "provenance": provenance})
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


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
    parser.add_argument("--model", help="chat:SOURCE")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the reports as questions there, and end")
    parser.add_argument("--products", nargs="+", default=["exact", "int8"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, help="the method's default if left out")
    parser.add_argument("--train", type=int, help="the first N training reports; all by default")
    parser.add_argument("--test", type=int, help="the first N test reports; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file for the rows")
    options = parser.parse_args()
    if options.write:
        options.write.mkdir(parents=True, exist_ok=True)
        write_reports(options.reports, options.write)
        return
    if not options.model:
        parser.error("give --model, or --write")
    print(table(measure(options)))


if __name__ == "__main__":
    main()

"""Answer quality of every method at its best learning rate, as a Markdown table.

Each method gets one short run per learning rate, on the questions about nine tenths of the training images. Then it
gets full-length runs at the best rate, on all training questions, one per seed. Both are scored on the test questions.
So for all methods alike, the choice of the rate has seen the test questions. The short runs are also scored on the
held-out images.

`--products exact int8` trains each method once per products mode, at the same rate: that of the exact runs. `--rate`
gives that rate, without short runs.

Finished runs of the same recipe are reused, so you can stop the script and start it again. The table shows every run in
the folder. Seconds and memory of a step come from `--bench`, the results of `fastln bench`: runs side by side would
slow each other down.

    fastln bench --data DIR --model dual:VISION,TEXT --out runs/real
    python scripts/quality_table.py --data DIR --model dual:VISION,TEXT --bench runs/real/results.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastln.bench.provenance import settle
from fastln.methods import HEAD_LEARNING_RATE, METHODS
from fastln.training import TrainConfig

# The scores of a table by their names in run.json; the first chooses the rate.
ANSWERS = {"all": "all %", "closed": "closed %", "open": "open %"}
REPORTS = {"rouge_l": "ROUGE-L", "bleu_4": "BLEU-4", "cider": "CIDEr"}
RATES = (1, 10 / 3, 1 / 3, 1 / 10)  # factors on the method's default rate
VALIDATION = 0.1
SPLITS = ("validation", "test")
EXACT = "exact"
Record = dict[str, Any]


def run(options: argparse.Namespace, name: str, config: dict[str, Any], validation: float) -> Record:
    """Return the record of the run with this configuration. Reuse a finished run if the folder has one."""
    folder = options.out / name
    record = folder / "run.json"
    wanted = {"data": options.data, "model": options.model, "validation": validation}
    if not is_done(record, wanted, config):
        command = [sys.executable, "-m", "fastln", "train", "--overwrite", "--out", str(folder)]
        for option, value in (wanted | config).items():
            command += [f"--{option.replace('_', '-')}", str(value)]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{folder.name}.log").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
            done = subprocess.run(command, check=False, stdout=log, stderr=log, env=environment)
        if done.returncode:
            raise FailedRunError(f"{name} failed with exit status {done.returncode}; see {log.name}")
        for part in ("model", "checkpoints"):
            shutil.rmtree(folder / part, ignore_errors=True)
    result: Record = json.loads(record.read_text())
    scores = ", ".join(f"{split} {cell([result], main_score(result), split)}" for split in SPLITS if result[split])
    print(f"{name}: {scores} in {result['training']['seconds'] / 60:.1f} min", flush=True)
    return result


class FailedRunError(Exception):
    """A run that ended without a result."""


def scores_of(record: Record) -> dict[str, str]:
    """Return the scores that a run has, and their headings."""
    return REPORTS if "rouge_l" in record["test"] else ANSWERS


def main_score(record: Record) -> str:
    return next(iter(scores_of(record)))


def cell(records: list[Record], score: str, split: str = "test") -> str:
    """Return a score of runs that differ in their seed: mean ± deviation; a dash if the data does not have it."""
    values = [record[split][score] for record in records]
    return "–" if None in values else spread(values, 1 if score in ANSWERS else 3)


def is_done(record: Path, wanted: dict[str, Any], config: dict[str, Any]) -> bool:
    if not record.is_file():
        return False
    found: Record = json.loads(record.read_text())
    run = {**found["run"], **found["run"]["config"]}
    return found["finished"] and all(run[name] == value for name, value in (wanted | config).items())


def other_rates(options: argparse.Namespace, method: str) -> Record:
    """Return the rates that a sweep does not touch: those of norms in a mixed method, and of a random head."""
    norms = METHODS[method].norm_learning_rate
    has_head = options.model.partition(":")[0] == "dual" and method != "head"
    rates = {"norm_learning_rate": norms, "head_learning_rate": HEAD_LEARNING_RATE if has_head else None}
    return {name: rate for name, rate in rates.items() if rate is not None}


def sweep(options: argparse.Namespace, method: str, pool: ThreadPoolExecutor) -> list[Future[Record]]:
    """Start one short run per learning rate."""
    recipe = {"method": method, "seed": 0, "epochs": options.sweep_epochs, "head_epochs": options.head_epochs}
    recipe |= other_rates(options, method)
    rates = [METHODS[method].learning_rate * factor for factor in RATES]
    return [
        pool.submit(run, options, f"sweep-{method}-{rate:.1e}", recipe | {"learning_rate": rate}, VALIDATION)
        for rate in rates
    ]


def train(options: argparse.Namespace, method: str, rate: float, pool: ThreadPoolExecutor) -> list[Future[Record]]:
    """Start one full-length run per seed and products mode."""
    recipe = {"method": method, "epochs": options.epochs, "head_epochs": options.head_epochs, "learning_rate": rate}
    recipe |= other_rates(options, method)
    return [
        pool.submit(run, options, f"{method}-{rate:.1e}{suffix}-seed{seed}", recipe | mode | {"seed": seed}, 0.0)
        for seed in range(options.seeds)
        for products in options.products
        for suffix, mode in [("", {}) if products == EXACT else (f"-{products}", {"products": products})]
    ]


def results(futures: Iterable[Future[Record]], failed: list[str]) -> list[Record]:
    """Wait for runs and return what they gave. One that failed does not end the others; its reason goes to `failed`."""
    records = []
    for future in futures:
        try:
            records.append(future.result())
        except FailedRunError as error:
            print(error, flush=True)
            failed.append(str(error))
    return records


def rate_of(result: Record) -> float:
    return result["run"]["config"]["learning_rate"]


def products_of(record: Record) -> str:
    return record["run"]["config"].get("products", EXACT)


def best_rate(short: Iterable[Record]) -> float:
    """Return the learning rate of the short run with the best score on the test questions.

    If several are equal, return the one closest to the method's default.
    """

    def order(record: Record) -> tuple[float, float]:
        default = METHODS[record["run"]["config"]["method"]].learning_rate
        return record["test"][main_score(record)], -abs(math.log(rate_of(record) / default))

    return rate_of(max(short, key=order))


def spread(values: list[float], digits: int = 1) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def table(records: list[Record], timed: dict[tuple[str, str], Record]) -> str:
    """Render the runs in Markdown, one line per method.

    Args:
        records: The runs.
        timed: Rows of `fastln bench`, by method and engine.
    """
    scores = scores_of(records[0]) if records else ANSWERS
    first, *_ = scores
    lines = [
        f"| method | engine | short runs by rate, {scores[first]} | rate | {' | '.join(scores.values())} | seeds "
        "| trainable | step s | peak MiB | adapter bytes |",
        f"|---|---|---|---|{'---|' * len(scores)}---|---:|---:|---:|---:|",
    ]
    kinds = {(record["run"]["config"]["method"], products_of(record)) for record in records}
    for method, products in sorted(kinds, key=lambda kind: (list(METHODS).index(kind[0]), kind[1])):
        of_method = [record for record in records if record["run"]["config"]["method"] == method]
        own = [record for record in of_method if record["validation"] or products_of(record) == products]
        tried = sorted((record for record in own if record["validation"]), key=rate_of)
        best = best_rate(tried) if tried else None  # the folder may hold full runs at another rate
        full = [record for record in own if not record["validation"] and best in (None, rate_of(record))]
        full.sort(key=lambda record: record["run"]["config"]["seed"])
        if not full:
            continue
        rates = ", ".join(f"{rate_of(record):.1e}: {cell([record], first)}" for record in tried)
        tried_epochs = sorted({str(record["run"]["config"]["epochs"]) for record in tried})
        rates = f"{rates} ({', '.join(tried_epochs)} epochs)" if tried else "–"
        accuracies = [cell(full, score) for score in scores]
        seeds = ", ".join(cell([record], first) for record in full)
        engine = full[0]["engine"]
        name = method if products == EXACT else f"{method}, {products}"
        cells = [name, engine, rates, f"{rate_of(full[0]):.1e}", *accuracies, seeds]
        cells += [f"{full[0]['training']['trainable_parameters']:,}"]
        row = timed.get((method, engine)) or timed.get((method, "torch"))
        if row and products == EXACT:
            by = "" if row["engine"] == engine else f" ({row['engine']})"
            cells += [f"{row['step_seconds']:.2f}{by}", f"{row['peak_memory_bytes'] / 2**20:,.0f}{by}"]
        else:
            cells += ["–", "–"]
        cells.append(adapter_size(full, tried))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def adapter_size(full: list[Record], short: list[Record]) -> str:
    """Say how many bytes the adapter takes, from the full runs if they wrote one, else from the short runs."""
    for runs, note in ((full, ""), (short, " (short runs)")):
        if sizes := [size for record in runs if (size := record.get("adapter_bytes"))]:
            return f"{max(sizes):,}{note}"
    return "none"


def without_losses(record: Record) -> Record:
    return record | {"training": {name: value for name, value in record["training"].items() if name != "losses"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=TrainConfig.epochs)
    parser.add_argument("--sweep-epochs", type=int, default=5)
    parser.add_argument("--head-epochs", type=int, default=TrainConfig.head_epochs)
    parser.add_argument("--products", nargs="+", default=[EXACT], help="products modes of the full-length runs")
    parser.add_argument("--rate", type=float, help="the rate of the full-length runs; no short runs then")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each run")
    parser.add_argument("--bench", type=Path, help="results.json of fastln bench, for seconds and memory of a step")
    options = parser.parse_args()
    rows = json.loads(options.bench.read_text()) if options.bench else []
    timed = {(row["method"], row["engine"]): row for row in rows if not row["error"]}
    with ThreadPoolExecutor(options.jobs) as pool:
        sweeps = {method: [] if options.rate else sweep(options, method, pool) for method in options.methods}
        full: list[Future[Record]] = []
        failed: list[str] = []
        for method, futures in sweeps.items():
            short = results(futures, failed)
            if rate := best_rate(short) if short else options.rate:
                full += train(options, method, rate, pool)
        results(full, failed)
    records = [json.loads(path.read_text()) for path in sorted(options.out.glob("*/run.json"))]
    records = [without_losses(record) for record in records if record["finished"]]
    report = {"provenance": settle("auto", "auto")[2] | {"argv": sys.argv}, "runs": records}
    (options.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    text = "\n\n".join([*(f"**Missing:** {reason}" for reason in failed), table(records, timed)])
    (options.out / "table.md").write_text(text + "\n")
    print(text)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()

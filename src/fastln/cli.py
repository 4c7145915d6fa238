"""The command line: fastln bench | train | eval | merge | doctor."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm.contrib.logging import logging_redirect_tqdm

from fastln.configured import ConfiguredCommand
from fastln.data.loading import READERS
from fastln.errors import FastLNError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Tune the norms of a transformer fast, and compare that with other tuning methods.",
)

Data = Annotated[str, typer.Option(help="'phantom' (embedded, synthetic), or a dataset's folder or file.")]
Layout = Annotated[
    str | None,
    typer.Option(help=f"How the data is laid out: {', '.join(READERS)}; recognised by default."),
]
Language = Annotated[str | None, typer.Option(help="Of SLAKE's questions: en (the default) or zh.")]
SkipBadRows = Annotated[bool, typer.Option("--skip-bad-rows", help="Leave bad rows out; the log lists them.")]
Model = Annotated[
    str,
    typer.Option(
        help="'dual', 'dual:VISION,TEXT', 'blip', 'blip:SOURCE', 'chat:SOURCE', or a folder that `fastln train` wrote."
    ),
]
DType = Annotated[str, typer.Option(help="float32, bfloat16, or auto: bfloat16 where the hardware has units for it.")]
FeatureCache = Annotated[
    Path | None, typer.Option(help="Keep a frozen vision tower's features in this folder and read them back.")
]
FeatureCacheSize = Annotated[str, typer.Option(help="The most that folder holds; the least recently used goes first.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
ImageSize = Annotated[
    int | None,
    typer.Option(help="Images are resized to this edge, in pixels; the size saved with the model by default."),
]


class TrainCommand(ConfiguredCommand):
    """`fastln train`, which knows the defaults of each method."""

    def defaults(self, values: dict[str, Any]) -> dict[str, str]:
        """Return the method's own engine and learning rates."""
        from fastln.methods import get_method, learning_rates

        _, engine = get_method(values["method"], values["engine"])
        rates = learning_rates(values["method"], values["learning_rate"], values["head_learning_rate"])
        norms = "" if rates.norms == rates.own else f"; norms {rates.norms:g}"
        return {"engine": engine, "learning_rate": f"{rates.own:g}{norms}", "head_learning_rate": f"{rates.head:g}"}


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.md and results.png.")] = Path(
        "runs/bench"
    ),
    suite: Annotated[str, typer.Option(help="A suite's name or YAML file; the options below override it.")] = "",
    data: Annotated[str | None, typer.Option(help="'phantom' or a dataset's folder.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(help="A model, as `fastln train --model`, or a shape such as BertForMaskedLM:8x128; repeatable."),
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="METHOD/ENGINE: layernorm/peft, LN-F-T/fastln, ...; repeatable.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions per step.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of each method.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Timed steps per turn.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=0, help="Epochs of training before answers are counted; 0 counts none.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16 or auto; repeatable.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, batches and dropout.")] = None,
    image_size: ImageSize = None,
    layout: Layout = None,
    language: Language = None,
    skip_bad_rows: SkipBadRows = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run in the folder.")] = False,
) -> None:
    """Compare methods by speed, memory and answers, each in a process of its own, in interleaved rounds."""
    from fastln.bench.report import show
    from fastln.bench.runner import run_suite
    from fastln.bench.suite import load_suite

    overrides = {
        "data": data,
        "models": model or None,
        "methods": method or None,
        "batch_size": batch_size,
        "rounds": rounds,
        "steps": steps,
        "epochs": epochs,
        "dtypes": dtype or None,
        "device": device,
        "seed": seed,
        "image_size": image_size,
        "layout": layout,
        "language": language,
        "skip_bad_rows": skip_bad_rows or None,
    }
    name = suite or ("quick" if data is None and model is None else "real")
    rows = run_suite(load_suite(name, overrides), out, overwrite=overwrite, argv=sys.argv)
    show(rows)
    if all(row.step_seconds is None for row in rows):
        raise typer.Exit(1)


@app.command(cls=TrainCommand)
def train(
    out: Annotated[Path, typer.Option(help="Folder for the trained model and its log.")] = Path("runs/train"),
    data: Data = "phantom",
    model: Model = "dual",
    method: Annotated[
        str, typer.Option(help="What trains: layernorm, lora, LN-F-T, ...; see the README.")
    ] = "layernorm",
    engine: Annotated[str | None, typer.Option(help="fastln, torch or peft; the method's best by default.")] = None,
    scope: Annotated[
        list[str] | None, typer.Option(help="vision, text, decoder or projector; repeatable; all by default.")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Leave out one thing that fastln changes; repeatable; see fastln doctor.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 15,
    head_epochs: Annotated[
        int, typer.Option(min=0, help="Epochs before those in which only a head that starts random trains.")
    ] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per step.")] = 32,
    learning_rate: Annotated[float | None, typer.Option(help="The method's own by default.")] = None,
    head_learning_rate: Annotated[float | None, typer.Option(help="Rate of a task head that starts random.")] = None,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of matrices; norms and biases never decay.")] = 0.01,
    warmup: Annotated[float, typer.Option(min=0, max=1, help="Share of the steps over which the rate rises.")] = 0.05,
    max_grad_norm: Annotated[float, typer.Option(help="Larger gradients are scaled down to this norm.")] = 1.0,
    questions_per_image: Annotated[
        int, typer.Option(min=1, help="The most questions on one image in a batch, which share its vision pass (dual).")
    ] = 16,
    validation: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of the training images whose questions are held out.")
    ] = 0.0,
    feature_cache: FeatureCache = None,
    feature_cache_size: FeatureCacheSize = "10GiB",
    dtype: DType = "auto",
    device: Device = "auto",
    adapter_dtype: Annotated[
        str, typer.Option(help="Dtype of the norms in OUT/adapter: float32, or float16 for half the bytes.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the head's weights, the batches and dropout.")] = 0,
    image_size: ImageSize = None,
    layout: Layout = None,
    language: Language = None,
    skip_bad_rows: SkipBadRows = False,
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run in the folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what trains, the memory and the first batch, then stop.")
    ] = False,
) -> None:
    """Tune a model, save it, and count its right answers to the test questions."""
    from fastln.data import DataOptions
    from fastln.training.config import TrainConfig
    from fastln.training.run import TrainRun, run_training
    from fastln.training.tensor_store import TensorStore

    config = TrainConfig(
        method=method,
        scope=tuple(scope) if scope else None,
        without=tuple(without) if without else None,
        epochs=epochs,
        head_epochs=head_epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        head_learning_rate=head_learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        max_grad_norm=max_grad_norm,
        questions_per_image=questions_per_image,
        seed=seed,
    )
    options = DataOptions(layout, language, skip_bad_rows)
    run = TrainRun(
        data,
        model,
        engine,
        config,
        validation=validation,
        dtype=dtype,
        device=device,
        options=options,
        adapter_dtype=adapter_dtype,
        image_size=image_size,
    )
    features = None if feature_cache is None else TensorStore(feature_cache, feature_cache_size)
    run_training(run, out, resume=resume, overwrite=overwrite, features=features, dry_run=dry_run)


@app.command("eval", cls=ConfiguredCommand)
def evaluate(
    model: Annotated[str, typer.Argument(help="A folder that `fastln train` wrote, or whatever its --model takes.")],
    data: Data = "phantom",
    split: Annotated[str, typer.Option(help="train, validation or test, as published.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    feature_cache: FeatureCache = None,
    feature_cache_size: FeatureCacheSize = "10GiB",
    dtype: DType = "auto",
    device: Device = "auto",
    predictions: Annotated[Path | None, typer.Option(help="Write every answer to this JSON Lines file.")] = None,
    metrics: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file.")] = None,
    image_size: ImageSize = None,
    layout: Layout = None,
    language: Language = None,
    skip_bad_rows: SkipBadRows = False,
    adapter: Annotated[
        Path | None, typer.Option(help="A folder such as OUT/adapter; MODEL is then the base that it was trained on.")
    ] = None,
) -> None:
    """Score a model's answers (all, closed, open) or its reports (BLEU, ROUGE-L, CIDEr)."""
    from fastln.data import DataOptions
    from fastln.training.eval_run import EvalRun, run_evaluation
    from fastln.training.tensor_store import TensorStore

    features = None if feature_cache is None else TensorStore(feature_cache, feature_cache_size)
    run = EvalRun(
        model,
        data,
        split,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        predictions=predictions,
        metrics=metrics,
        options=DataOptions(layout, language, skip_bad_rows),
        adapter=adapter,
        image_size=image_size,
    )
    run_evaluation(run, features)


@app.command(cls=ConfiguredCommand)
def merge(
    adapter: Annotated[Path, typer.Argument(help="The adapter's folder, such as OUT/adapter; fastln's or peft's.")],
    base: Annotated[
        str,
        typer.Option(
            help="The model it was trained on: a directory, a hub name, or a folder that `fastln train` wrote."
        ),
    ],
    out: Annotated[Path, typer.Option(help="A new folder for the merged model.")],
    check_base: Annotated[
        bool, typer.Option(help="Refuse a base whose frozen weights differ from those that the adapter was trained on.")
    ] = True,
) -> None:
    """Write a base model with an adapter's values in it, in the base's dtype, and its tokenizer and preprocessing."""
    from fastln.training.merge_run import merge_into_base

    merge_into_base(base, adapter, out, check_base=check_base)


@app.command()
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Show the plan for this model: a directory, a hub name, a configuration's .json file, a folder that "
            "`fastln train` wrote, or a shape such as BertForMaskedLM:8x128. No weights are read."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this machine has, which backend each operation will use, and what `prepare` would change in a model."""
    from fastln.doctor import examine, render

    findings = examine(model)
    typer.echo(json.dumps(findings, indent=2) if as_json else render(findings))


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    return f"warning: {message}\n"


def main() -> None:
    """Run the command line; a user's error is one line on stderr and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    warnings.formatwarning = _one_line
    try:
        with logging_redirect_tqdm():  # so that messages and the progress bar have lines of their own
            app()
    except FastLNError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)

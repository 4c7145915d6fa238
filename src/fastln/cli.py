"""The command line: fastln bench | train | eval | merge | plan | doctor."""

from __future__ import annotations

import io
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from fastln.cli_options import (
    Activations,
    Data,
    Device,
    DType,
    FeatureCache,
    FeatureCacheSize,
    ImageSize,
    KeepRepeats,
    Language,
    Layout,
    MemoryBudget,
    Model,
    Products,
    SkipBadRows,
)
from fastln.configured import ConfiguredCommand, OptionalValues
from fastln.errors import FastLNError
from fastln.plan_command import plan
from fastln.progress import around_bars, close_bars
from fastln.versions import package_version

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its columns cut the names of options short in 80 columns
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastln {package_version('fastln') or 'unknown'}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Tune the norms of a transformer fast, and compare that with other tuning methods."""


class TrainCommand(ConfiguredCommand):
    """`fastln train`, with the defaults of each method."""

    def defaults(self, values: dict[str, Any]) -> dict[str, str]:
        """Return the method's own engine, and the learning rates that are used."""
        from fastln.methods import get_method, learning_rates

        _, engine = get_method(values["method"], values["engine"])
        given = {group: values[f"{group}_learning_rate"] for group in ("norm", "head")}
        rates = learning_rates(values["method"], values["learning_rate"], norms=given["norm"], head=given["head"])
        return {
            "engine": engine,
            "learning_rate": f"{rates.own:g}",
            "norm_learning_rate": f"{rates.norms:g}",
            "head_learning_rate": f"{rates.head:g}",
        }


@app.command(cls=OptionalValues, short_help="Compare the speed, memory and answers of methods.")
def bench(
    out: Annotated[Path, typer.Option(help="Folder for results.json, results.md and results.png.")] = Path(
        "runs/bench"
    ),
    suite: Annotated[str, typer.Option(help="Name or YAML file of a suite; the options below override it.")] = "",
    data: Annotated[str | None, typer.Option(help="'phantom' or a dataset's folder.")] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model, as for `fastln train --model`, or a shape such as BertForMaskedLM:8x128; repeatable."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="METHOD/ENGINE or METHOD/ENGINE/DTYPE: layernorm/peft, LN-F-T/fastln, ...; repeatable."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions per step.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds per method.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Timed steps per round.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=0, help="Epochs of training before the answers are scored; 0: do not score.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16 or auto; repeatable.")] = None,
    products: Annotated[
        list[str] | None,
        typer.Option(help="Products of engine fastln's rows: exact or int8; repeatable.", metavar="PRODUCTS"),
    ] = None,
    activations: Annotated[
        list[str] | None,
        typer.Option(help="What engine fastln's rows keep for backward: exact, ...; repeatable.", metavar="STORAGE"),
    ] = None,
    memory_budget: Annotated[
        list[str] | None,
        typer.Option(
            help="A further row of engine fastln within this memory: 8GiB, a share of the device's (0.5), or 0.6x: "
            "of what exact storage takes beside the weights; repeatable."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for weights, batches and dropout.")] = None,
    image_size: ImageSize = None,
    layout: Layout = None,
    language: Language = None,
    skip_bad_rows: SkipBadRows = "none",
    keep_repeats: KeepRepeats = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run in the folder.")] = False,
) -> None:
    """Compare the speed, memory and answers of methods, each in its own process, in interleaved rounds."""
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
        "products": products or None,
        "activations": activations or None,
        "memory_budgets": memory_budget or None,
        "device": device,
        "seed": seed,
        "image_size": image_size,
        "layout": layout,
        "language": language,
        "skip_bad_rows": None if skip_bad_rows == "none" else skip_bad_rows,
        "keep_repeats": keep_repeats or None,
    }
    name = suite or ("quick" if data is None and model is None else "real")
    rows = run_suite(load_suite(name, overrides), out, overwrite=overwrite, argv=sys.argv)
    show(rows)
    if all(row.step_seconds is None for row in rows):
        raise typer.Exit(1)


@app.command(cls=TrainCommand, short_help="Tune a model, save it, and score its answers.")
def train(
    out: Annotated[Path, typer.Option(help="Folder for the trained model and its log.")] = Path("runs/train"),
    data: Data = "phantom",
    model: Model = "dual",
    method: Annotated[
        str, typer.Option(help="Tuning method: layernorm, lora, LN-F-T, ...; docs/methods.md lists all.")
    ] = "layernorm",
    engine: Annotated[
        str | None, typer.Option(help="fastln, torch or peft; the method's first engine by default.")
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="Part to tune: vision, text, decoder, projector, or a pattern of module names; 'not:' before one "
            "leaves it out; repeatable; all by default."
        ),
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(help="Leave out one of fastln's changes; repeatable; fastln doctor lists them.")
    ] = None,
    activations: Activations = "exact",
    memory_budget: MemoryBudget = None,
    products: Products = "exact",
    keep_weights: Annotated[
        bool,
        typer.Option(
            "--keep-weights",
            help="Keep the weights that 8-bit ones replace; otherwise the base is loaded again at the end.",
        ),
    ] = False,
    epochs: Annotated[int, typer.Option(min=1)] = 15,
    head_epochs: Annotated[
        int, typer.Option(min=0, help="Epochs before these that train only a randomly initialised head.")
    ] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per step.")] = 32,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Learning rate of all that trains; if not given, norms, head and others have defaults each."),
    ] = None,
    norm_learning_rate: Annotated[float | None, typer.Option(help="Learning rate of norms.")] = None,
    head_learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate of a randomly initialised task head.")
    ] = None,
    weight_decay: Annotated[
        float, typer.Option(min=0, help="Weight decay of matrices; norms and biases never decay.")
    ] = 0.01,
    warmup: Annotated[
        float, typer.Option(min=0, max=1, help="Fraction of the steps over which the learning rate rises.")
    ] = 0.05,
    max_grad_norm: Annotated[float, typer.Option(help="Clip gradients to this norm.")] = 1.0,
    questions_per_image: Annotated[
        int, typer.Option(min=1, help="Most questions on one image in a batch; they share a vision pass (dual).")
    ] = 16,
    validation: Annotated[
        float, typer.Option(min=0, max=0.5, help="Fraction of the training images whose questions are held out.")
    ] = 0.0,
    feature_cache: FeatureCache = None,
    feature_cache_size: FeatureCacheSize = None,
    dtype: DType = "auto",
    device: Device = "auto",
    adapter_dtype: Annotated[
        str, typer.Option(help="Dtype of the norms in OUT/adapter: float32, or float16 for half the bytes.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Seed for the head's weights, the batches and dropout.")] = 0,
    image_size: ImageSize = None,
    layout: Layout = None,
    language: Language = None,
    skip_bad_rows: SkipBadRows = "none",
    keep_repeats: KeepRepeats = False,
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint in the folder.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run in the folder.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what trains, the memory and the first batch, then stop.")
    ] = False,
) -> None:
    """Tune a model, save it, and score its answers to the test questions."""
    from fastln.data import DataOptions
    from fastln.training.config import TrainConfig
    from fastln.training.run import TrainRun, run_training
    from fastln.training.tensor_store import TensorStore

    config = TrainConfig(
        method=method,
        scope=tuple(scope) if scope else None,
        without=tuple(without) if without else None,
        activations=activations,
        memory_budget=memory_budget,
        products=products,
        keep_weights=keep_weights,
        epochs=epochs,
        head_epochs=head_epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        norm_learning_rate=norm_learning_rate,
        head_learning_rate=head_learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        max_grad_norm=max_grad_norm,
        questions_per_image=questions_per_image,
        seed=seed,
    )
    options = DataOptions(layout, language, skip_bad_rows, keep_repeats)
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
    features = TensorStore.at(feature_cache, feature_cache_size)
    run_training(run, out, resume=resume, overwrite=overwrite, features=features, dry_run=dry_run)


@app.command("eval", cls=ConfiguredCommand, short_help="Score a model's answers or its reports.")
def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder that `fastln train` wrote, its adapter or a checkpoint, or any value of its --model; with "
            "--adapter by default the base that the adapter names."
        ),
    ] = None,
    data: Data = "phantom",
    split: Annotated[str, typer.Option(help="train, validation or test, as published.")] = "test",
    validation: Annotated[
        float, typer.Option(min=0, max=0.5, help="The run's --validation, which set aside its validation split.")
    ] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    feature_cache: FeatureCache = None,
    feature_cache_size: FeatureCacheSize = None,
    dtype: DType = "auto",
    device: Device = "auto",
    predictions: Annotated[Path | None, typer.Option(help="Write every answer to this JSON Lines file.")] = None,
    metrics: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file.")] = None,
    image_size: ImageSize = None,
    layout: Layout = None,
    language: Language = None,
    skip_bad_rows: SkipBadRows = "none",
    keep_repeats: KeepRepeats = False,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter or checkpoint folder, such as OUT/adapter; MODEL is then its base.")
    ] = None,
) -> None:
    """Score a model's answers (all, closed, open) or its reports (BLEU, ROUGE-L, CIDEr)."""
    from fastln.data import DataOptions
    from fastln.training.eval_run import EvalRun, run_evaluation
    from fastln.training.tensor_store import TensorStore

    features = TensorStore.at(feature_cache, feature_cache_size)
    run = EvalRun(
        model,
        data,
        split,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        predictions=predictions,
        metrics=metrics,
        options=DataOptions(layout, language, skip_bad_rows, keep_repeats),
        adapter=adapter,
        image_size=image_size,
        validation=validation,
    )
    run_evaluation(run, features)


@app.command(cls=ConfiguredCommand, short_help="Merge an adapter into its base model.")
def merge(
    adapter: Annotated[
        Path, typer.Argument(help="Adapter or checkpoint folder, such as OUT/adapter; written by fastln or peft.")
    ],
    out: Annotated[Path, typer.Option(help="A new folder for the merged model.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="The model that it was trained on: a directory, a hub name, a folder that `fastln train` wrote, or "
            "any value of its --model; by default the one that the adapter names."
        ),
    ] = None,
    check_base: Annotated[
        bool, typer.Option(help="Refuse a base whose frozen weights differ from those that the adapter was trained on.")
    ] = True,
) -> None:
    """Merge an adapter into its base model; write the result in the base's dtype, with tokenizer and preprocessing."""
    from fastln.training.merge_run import merge_into_base

    merge_into_base(base, adapter, out, check_base=check_base)


app.command(cls=ConfiguredCommand, short_help="Predict memory and time of training, before it is launched.")(plan)


@app.command(short_help="Show what this machine has, and the plan for a model.")
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Show the plan for this model: a directory, a hub name, a configuration's .json file, a folder that "
            "`fastln train` wrote, blip, chat:SOURCE, or a shape such as BertForMaskedLM:8x128. No weights are read. "
            "dual has no plan before its data: give VISION or TEXT alone."
        ),
    ] = None,
    products: Products = "exact",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this machine has, which backend each operation will use, and what `prepare` would change in a model."""
    from fastln.doctor import examine, render

    findings = examine(model, products)
    typer.echo(json.dumps(findings, indent=2) if as_json else render(findings))


INTERRUPTED = 130
"""The exit status after Ctrl-C."""


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    return f"warning: {message}\n"


def main() -> None:
    """Run the command line; a user's error is one line on stderr and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    warnings.formatwarning = _one_line
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    with around_bars():
        try:
            app()
        except FastLNError as error:
            close_bars()
            typer.echo(f"error: {error}", err=True)
            sys.exit(2)
        except (KeyboardInterrupt, SystemExit) as end:
            if isinstance(end, SystemExit) and end.code != INTERRUPTED:  # typer turns the first into the second
                raise
            close_bars()
            typer.echo("interrupted", err=True)
            sys.exit(INTERRUPTED)
        finally:
            close_bars()

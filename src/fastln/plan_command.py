"""`fastln plan`: what a training run will take, before it is launched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastln.cli_options import Activations, KeepRepeats, Language, Layout, Products, SkipBadRows
from fastln.errors import FastLNError

if TYPE_CHECKING:
    from fastln.planning.forecast import Forecast


def plan(
    model: Annotated[
        str,
        typer.Option(
            help="A directory, a hub name, a configuration's .json file, a folder that `fastln train` wrote, "
            "blip:SOURCE, chat:SOURCE, or a shape such as BertForMaskedLM:8x128. No weights are read."
        ),
    ] = "",
    method: Annotated[str, typer.Option(help="Tuning method: layernorm, lora, LN-F-T, ...")] = "layernorm",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples per step; 8, or a shape's, by default.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Edge length of images, in pixels; the model's by default.")
    ] = None,
    text_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each text; those of --data, or what is usual, by default.")
    ] = None,
    activations: Activations = "exact",
    products: Products = "exact",
    memory: Annotated[str | None, typer.Option(help="The memory that there is, such as 24GiB.")] = None,
    device: Annotated[
        str | None, typer.Option(help="The device, such as 'RTX 4090', or cpu for this processor; all by default.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or auto: bfloat16 where the device has units for it.")
    ] = "auto",
    data: Annotated[
        str | None, typer.Option(help="'phantom', or a dataset's folder or file, for minutes per epoch.")
    ] = None,
    layout: Layout = None,
    language: Language = None,
    skip_bad_rows: SkipBadRows = "none",
    keep_repeats: KeepRepeats = False,
    picture: Annotated[Path | None, typer.Option(help="Draw peak memory against step time into this PNG file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything into this JSON file.")] = None,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="Show how far predictions were from measured runs, and stop.")
    ] = False,
) -> None:
    """Predict memory and time of a training step from a configuration alone, and which storage mode to take."""
    # Imported here because transformers' models take seconds to import.
    from fastln.planning.accuracy import accuracy_table

    if accuracy:
        typer.echo(accuracy_table())
        return
    from fastln.data import DataOptions
    from fastln.files import user_path
    from fastln.models.example import BatchSize
    from fastln.planning.forecast import Request, forecast
    from fastln.planning.report import draw, render
    from fastln.sizes import parse_bytes

    if not model:
        raise FastLNError("name a model: fastln plan --model NAME_OR_CONFIG")
    size = BatchSize(batch_size, image_size, text_length)
    request = Request(
        model,
        method,
        size,
        activations,
        products,
        dtype,
        budget=None if memory is None else parse_bytes(memory),
        device=device,
        data=data,
        options=DataOptions(layout, language, skip_bad_rows, keep_repeats),
    )
    found = forecast(request)
    typer.echo(render(found))
    for path, write in ((picture, draw), (json_file, _write)):
        if path is not None:
            try:
                write(found, user_path(path))
            except OSError as error:
                raise FastLNError(f"{path}: cannot be written: {error}") from error


def _write(found: Forecast, path: Path) -> None:
    from fastln.planning.report import as_json

    path.write_text(json.dumps(as_json(found), indent=2) + "\n", encoding="utf-8")

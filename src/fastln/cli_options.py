"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastln.reading import LAYOUTS

Data = Annotated[str, typer.Option(help="'phantom' (embedded, synthetic), or a dataset's folder or file.")]
Layout = Annotated[
    str | None,
    typer.Option(help=f"How the data is laid out: {', '.join(LAYOUTS)}; recognised by default."),
]
Language = Annotated[str | None, typer.Option(help="Language of SLAKE's questions: en (the default) or zh.")]
SkipBadRows = Annotated[
    str,
    typer.Option(
        "--skip-bad-rows",
        metavar="[LIMIT]",
        help="Skip bad rows; the log lists them. LIMIT: all (the default), a number of rows, or a share such as 1%.",
    ),
]
KeepRepeats = Annotated[
    bool, typer.Option("--keep-repeats", help="Keep training rows that the test or validation split repeats.")
]
Model = Annotated[
    str,
    typer.Option(
        help="'dual', 'dual:VISION,TEXT', 'blip', 'blip:SOURCE', 'chat:SOURCE', or a folder that `fastln train` wrote."
    ),
]
DType = Annotated[str, typer.Option(help="float32, bfloat16 or auto: the one that this machine multiplies faster.")]
FeatureCache = Annotated[Path | None, typer.Option(help="Cache a frozen vision tower's features in this folder.")]
FeatureCacheSize = Annotated[
    str | None, typer.Option(help="Maximum size of the cache, 10GiB by default; the least recently used goes first.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
Activations = Annotated[
    str,
    typer.Option(
        help="What is kept for backward: exact, again, recompute, checkpoint, ... (see docs/memory.md).",
        metavar="STORAGE",
    ),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(help="Memory that a step may take (8GiB): each block keeps what fits. A share such as 0.9, too."),
]
Products = Annotated[
    str,
    typer.Option(
        help="How matrix products of frozen weights run: exact, or int8 for 8 bits.",
        metavar="PRODUCTS",
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(help="Edge length in pixels that images are resized to; by default the size saved with the model."),
]

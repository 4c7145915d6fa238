"""What an adapter or a checkpoint says about its base, in `fastln.json`: enough to load it again and use it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastln.errors import FastLNError

ORIGIN = "fastln.json"


@dataclass(frozen=True)
class Origin:
    """The base of an adapter or a checkpoint, and what else its use takes.

    Attributes:
        model: the base, as `fastln train --model` takes it; a directory, or a hub name. Directories are absolute.
        dtype: the base's dtype in training.
        seed: seed of what is initialised randomly in the base.
        image_size: the size that images were resized to, if one was chosen.
        answers: the answers that a classifier chooses from, in their order.
    """

    model: str | None = None
    dtype: str | None = None
    seed: int = 0
    image_size: int | None = None
    answers: tuple[str, ...] | None = None

    @property
    def source(self) -> str | None:
        """The base as transformers and peft take it: a directory or a hub name, without fastln's kind of task."""
        kind, _, rest = (self.model or "").partition(":")
        return rest if kind in ("blip", "chat") and rest else self.model


def origin_bytes(origin: Origin, **further: Any) -> bytes:
    """Return the contents of the file."""
    return (json.dumps({"base": asdict(origin), **further}, indent=1, ensure_ascii=False) + "\n").encode()


def read_origin(folder: Path) -> tuple[Origin, dict[str, Any]]:
    """Return the origin in a folder, and the file's further entries; empty ones if there is no file.

    Raises:
        FastLNError: if the file cannot be read.
    """
    path = folder / ORIGIN
    try:
        entries = dict(json.loads(path.read_text(encoding="utf-8")))
        base = dict(entries.pop("base"))
        answers = base.pop("answers")
        return Origin(**base, answers=None if answers is None else tuple(map(str, answers))), entries
    except FileNotFoundError:
        return Origin(), {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FastLNError(f"{path}: cannot be read: {error!r}") from error


def absolute(model: str) -> str:
    """Return `model`, as `fastln train --model` takes it, with directories and files as absolute paths."""
    kind, colon, rest = model.partition(":")
    if model in ("dual", "blip"):  # the embedded ones, whatever lies here under these names
        return model
    if colon and kind in ("dual", "blip", "chat"):
        return f"{kind}:{','.join(_absolute(source.strip()) for source in rest.split(','))}"
    return _absolute(model)


def _absolute(source: str) -> str:
    path = Path(source)
    return str(path.absolute()) if path.exists() else source

"""run.json, the record of a training run: its options, its data and its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastln.errors import FastLNError
from fastln.files import json_text


def write_json(path: Path, values: dict[str, object]) -> None:
    """Write values as JSON; readers never find a partial file."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json_text(values, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


_LATER = {"activations": "exact", "memory_budget": None, "products": "exact", "keep_weights": False}
"""The values, in records of earlier versions, of options that these did not have."""


def is_finished(record: Path) -> bool | None:
    """Whether the run finished; None if no record says so."""
    try:
        return bool(json.loads(record.read_text(encoding="utf-8"))["finished"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_same_options(run: dict[str, Any], record: Path) -> None:
    """Check that the run to resume had the same options.

    Args:
        run: the current options, by name; those under `config` count like the others.
        record: the record of the run to resume.

    Raises:
        FastLNError: for the first option that differs, or a record that cannot be read.
    """
    before = _LATER | _options(_recorded(record, "run"))
    for name, value in json.loads(json.dumps(_options(run))).items():  # as in JSON: lists instead of tuples
        if before.get(name) != value:
            raise FastLNError(f"{record}: the run to resume had {name} {_shown(before.get(name))}, not {_shown(value)}")


def check_same_data(data: str, digests: dict[str, str], record: Path) -> None:
    """Check that the run to resume read the same questions and images.

    Args:
        data: the dataset's name.
        digests: the current digests of its splits.
        record: the record of the run to resume.

    Raises:
        FastLNError: naming the splits that differ, or for a record that cannot be read.
    """
    before = _recorded(record, "digests")
    changed = sorted(split for split in before.keys() | digests.keys() if before.get(split) != digests.get(split))
    if changed:
        raise FastLNError(
            f"{data}: its {' and '.join(changed)} questions or images are not those that the run to resume read, "
            f"as {record} has it: bring them back, or train anew with --overwrite"
        )


def _recorded(record: Path, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(record.read_text(encoding="utf-8"))[name])
    except (OSError, ValueError, KeyError, TypeError):
        raise FastLNError(f"{record}: this is not the record of a run, so there is nothing to resume") from None


def _shown(value: object) -> str:
    return "by default" if value is None else repr(value)


def _options(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name != "config"} | run.get("config", {})

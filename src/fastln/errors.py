"""The one exception that fastln raises for what a user can put right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FastLNError(ValueError):
    """Bad input: the message says what was wrong, where, and what would be right.

    The command line prints the message alone and exits with status 2; library users catch it as a `ValueError`.
    """


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Turn whatever is raised while `source`, a directory or hub name, is loaded into a FastLNError that names it."""
    try:
        yield
    except FastLNError:
        raise
    # transformers and peft raise errors of many kinds for a broken file, from safetensors' own to a plain TypeError.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "" if Path(source).exists() else " (there is no such directory, and the hub does not have it)"
        raise FastLNError(f"{source}: cannot be loaded{hint}: {reason}") from error

"""The exception that fastln raises for errors that the user can fix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class FastLNError(ValueError):
    """Invalid input. The message says what is wrong, where, and how to fix it.

    The command line prints only the message and exits with status 2. Library users can catch it as a `ValueError`.
    """


def listing(problems: Sequence[str], most: int = 20) -> str:
    """Return the first problems of a list, one on each line, and the number of the others."""
    rest = [f"... and {len(problems) - most:,} more"] if len(problems) > most else []
    return "\n  ".join([*problems[:most], *rest])


@contextmanager
def loading(source: str) -> Iterator[None]:
    """Turn whatever is raised while `source`, a directory or hub name, is loaded into a FastLNError that names it."""
    try:
        yield
    except FastLNError:
        raise
    # transformers and peft raise errors of many kinds for a broken file, from safetensors' own to a plain TypeError.
    except Exception as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__  # in one line
        hint = "" if Path(source).exists() else " (there is no such directory, and the hub does not have it)"
        raise FastLNError(f"{source}: cannot be loaded{hint}: {reason}") from error

"""Progress bars to which nothing is glued: what is written while one is open gets lines of its own, above it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from tqdm import tqdm


@contextlib.contextmanager
def bar(*, total: int, desc: str, unit: str, initial: int = 0, shown: bool = True) -> Iterator[Any]:
    """Show a progress bar on stderr (tqdm's) while the context lasts; its line ends with the context, error or not.

    Args:
        total: How many steps there are.
        desc: What the bar shows the progress of.
        unit: What a step is called.
        initial: How many steps are done already.
        shown: False to show nothing.
    """
    with contextlib.ExitStack() as stack:
        if shown:
            stack.enter_context(around_bars())
        stream = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
        yield stack.enter_context(
            tqdm(total=total, desc=desc, unit=unit, initial=initial, disable=not shown, file=stream)
        )


@contextlib.contextmanager
def around_bars() -> Iterator[None]:
    """Let everything that this process writes to the terminal leave open bars alone, other libraries' bars included.

    For the context's length this replaces `sys.stderr` (and `sys.stdout` if it is a terminal), and the streams of all
    log handlers that write there.
    """
    if isinstance(sys.stderr, _Above):
        yield
        return
    before = sys.stdout, sys.stderr
    above = _Above(sys.stdout) if sys.stdout.isatty() else sys.stdout, _Above(sys.stderr)
    sys.stdout, sys.stderr = above
    try:
        with contextlib.ExitStack() as stack:
            for old, new in zip(before, above, strict=True):
                stack.enter_context(logs_moved(old, new))
            yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in above:
            if isinstance(stream, _Above):
                stream.settle()


@contextlib.contextmanager
def logs_moved(old: Any, new: Any) -> Iterator[None]:
    """Let the log handlers that write to stream `old`, of whatever library, write to `new` while the context lasts."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = [handler for logger in loggers for handler in getattr(logger, "handlers", ())]
    moved = [one for one in handlers if isinstance(one, logging.StreamHandler) and one.stream is old]
    for handler in moved:
        handler.setStream(new)
    try:
        yield
    finally:
        for handler in moved:
            if handler.stream is new:
                handler.setStream(old)


def close_bars() -> None:
    """End the lines of all open bars, so that what follows begins on its own."""
    for one in _open_bars():
        one.close()


def _open_bars() -> list[Any]:
    return [one for one in list(getattr(tqdm, "_instances", ())) if not one.disable and hasattr(one, "start_t")]


class _Above:
    """A stream that takes open bars off the screen while a line is written to it.

    Args:
        stream: Where the lines go.
    """

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream  # rich draws bars of its own, and looks here for where
        self._line = ""
        self._is_writing = False

    def write(self, text: str) -> int:
        """Write whole lines; while a bar is open, the beginning of a line waits for its end."""
        stream = self.rich_proxied_file
        is_a_bar = text.startswith("\r")
        if is_a_bar or self._is_writing or not (self._line or _open_bars()):
            stream.write(text)
            return len(text)
        *lines, self._line = (self._line + text).split("\n")
        if lines:
            self._is_writing = True
            try:
                with tqdm.get_lock():
                    bars = _open_bars()
                    if stream.isatty():
                        for one in bars:
                            one.clear(nolock=True)
                    else:  # nothing can be taken back in a file: the bar's line ends
                        stream.write("\n")
                    stream.write("\n".join(lines) + "\n")
                    stream.flush()
                    for one in bars:
                        one.refresh(nolock=True)
            finally:
                self._is_writing = False
        return len(text)

    def settle(self) -> None:
        """Write what still waits for the end of its line."""
        self.rich_proxied_file.write(self._line)
        self._line = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)

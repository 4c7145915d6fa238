"""Show progress on stderr: a bar on a terminal, a line as each run starts and one as it ends in a log."""

import contextlib
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from fastln.progress import logs_moved


class Progress:
    """Progress of a suite, as a context manager. Call `begin` before each run and `end` after it.

    Args:
        total: The number of runs.
        console: Where to write; stderr by default.
    """

    def __init__(self, total: int, console: Console | None = None):
        self._console = console or Console(stderr=True, highlight=False)
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=total)
        self._total = total
        self._done = 0
        self._label = ""
        self._since = 0.0
        self._logs = contextlib.ExitStack()

    def __enter__(self) -> "Progress":
        before = sys.stderr
        self._bar.start()
        # On a terminal, rich has now replaced sys.stderr by a stream that writes above its bar.
        self._logs.enter_context(logs_moved(before, sys.stderr))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._logs.close()
        self._bar.stop()

    def begin(self, label: str) -> None:
        """Show that a run starts."""
        self._label, self._since = label, time.monotonic()
        self._bar.update(self._task, description=label)
        if not self._console.is_terminal:
            # Printed before the run, so that a log shows which run hangs.
            self._print(f"[{self._done + 1:>{len(str(self._total))}}/{self._total}] {label} ...")

    def end(self, result: str) -> None:
        """Show that the run has ended, with its result in a few words."""
        self._print(f"{self._label}: {result} ({time.monotonic() - self._since:.1f} s)")
        self._done += 1
        self._bar.update(self._task, completed=self._done)

    def add(self, runs: int) -> None:
        """Add runs to the total."""
        self._total += runs
        self._bar.update(self._task, total=self._total)

    def drop(self, runs: int) -> None:
        """Remove runs from the total."""
        self.add(-runs)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

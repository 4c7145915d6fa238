"""Runs a function on several items at once, on threads that end with the call."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from fastln.machine import usable_cpus

S = TypeVar("S")
T = TypeVar("T")

logger = logging.getLogger(__name__)


def in_threads(function: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """Return what a function makes of each item, in the order of the items.

    It runs on as many threads as torch uses, but at most one per CPU that the process may use and one per item; if that
    is one, on the caller's own. No thread outlives the call: a process that is forked later lacks none that it would
    wait for, and none is left when the interpreter ends.

    Args:
        function: Must allow several calls at once. It should spend its time where Python's lock is released.
        items: What it takes.

    Raises:
        Exception: What the function raises for the first item, in their order, for which it raises. Items that have not
            begun by then are left out; so it is with KeyboardInterrupt.
    """
    n_threads = min(torch.get_num_threads(), usable_cpus(), len(items))
    if n_threads > 1:
        pool = ThreadPoolExecutor(n_threads, "fastln")
        try:
            try:
                futures = [pool.submit(function, item) for item in items]
            except RuntimeError as error:  # the interpreter is ending, or the system allows no more threads
                _tell(str(error))
            else:
                return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)
    return [function(item) for item in items]


@functools.cache
def _tell(reason: str) -> None:
    logger.warning("images are made one after the other, because no thread can be started: %s", reason)

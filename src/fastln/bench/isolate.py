"""Call a function in a fresh process and return its result, or why it failed."""

import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

from fastln.bench.results import Failure
from fastln.errors import FastLNError

Result = TypeVar("Result")

# The fork server imports this once, which is slow. Each process is then a fast fork of the server. It shares no
# allocator state and no autotuning results with other runs. Importing starts no threads.
_PRELOAD = ["fastln.bench.worker"]


def call(function: Callable[..., Result], *arguments: Any, timeout_seconds: float) -> Result | Failure:
    """Call `function` in its own process.

    Args:
        function: The function to call. It must be importable by name; it, its arguments and its result must pickle.
        arguments: Its arguments.
        timeout_seconds: Time limit. The process is killed if it has not finished by then.

    Returns:
        The function's result, or a Failure if it raised, died (for example from a signal or lack of memory) or took
        too long. If the process died, the Failure includes the last lines that it printed.
    """
    # Querying NVML does not initialise CUDA, so processes forked afterwards can still use the GPU.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix="fastln-bench-") as folder:
        log = Path(folder) / "log.txt"
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(sender, log, function, arguments), daemon=True)
        process.start()
        sender.close()  # now the pipe closes when the process ends
        try:
            if not receiver.poll(timeout_seconds):
                return Failure(f"stopped: not finished after {timeout_seconds:g} s (timeout_seconds)")
            answer = receiver.recv()
            process.join(timeout=60)
            return answer
        except EOFError:
            process.join()
            return Failure(_death(process.exitcode, log))
        finally:
            process.kill()
            process.join()
            receiver.close()


def _child(sender: Connection, log: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and then ends this process
    with log.open("w", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    # Gradients of random weights vanish in some models, and subnormal numbers take processors a hundred times as long.
    torch.set_flush_denormal(True)
    try:
        answer = function(*arguments)
    except FastLNError as error:
        answer = Failure(str(error), user_error=True)
    except Exception as error:
        answer = Failure(_last_words(error))
    sender.send(answer)


def _last_words(error: Exception) -> str:
    message = traceback.format_exception_only(error)[-1].strip()
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return "\n".join([message, *(f"  at {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)])


def _death(exitcode: int | None, log: Path) -> str:
    if exitcode is not None and exitcode < 0:
        hint = " (out of memory?)" if -exitcode == signal.SIGKILL else f" ({signal.strsignal(-exitcode)})"
        text = f"killed by signal {-exitcode}{hint}"
    else:
        text = f"the process exited with status {exitcode} before it returned a result"
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:] if log.exists() else []
    return "\n".join([text, *(f"  {line}" for line in last)])

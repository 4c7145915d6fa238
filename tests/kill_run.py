"""Kills a small run again and again: `kill_run.py FOLDER random N SEED` or `kill_run.py FOLDER saving FIRST LAST`.

Every attempt is a fork of this process, which has everything imported. After every kill each checkpoint must be whole.
"random": SIGKILL after a random time, N times. "saving": attempt n kills itself at the n-th thing that saving does to
the disk, counted from the start of the attempt, for n from FIRST to LAST. At the end a last attempt runs through, as an
undisturbed one did before: what both leave is for the caller to compare.
"""

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import small_run
import torch

from fastln.training import checkpoints, trained

N_STEPS = {"random": 40, "saving": 12}
"""A kill at a random time needs a run of some seconds."""
SETTINGS = {"save_steps": 1, "logging_steps": 50}
ON_THE_DISK = (
    (os, "fsync"),
    (os, "rename"),
    (os, "unlink"),
    (os, "rmdir"),
    (torch, "save"),
    (trained, "save_file"),
    (Path, "write_bytes"),
)


def attempt(folder, n_steps, die_at=None):
    """Start an attempt in a fork, and return its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if die_at is not None:
                die_in_saving(die_at)
            small_run.main(folder, SETTINGS | {"max_steps": n_steps}, dropout=0.1)
            code = 0
        finally:
            os._exit(code)
    return pid


def die_in_saving(at):
    n_calls = 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal n_calls
            n_calls += 1
            if n_calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for module, name in ON_THE_DISK:
        setattr(module, name, dying(getattr(module, name)))


def end(folder, pid):
    """Wait for an attempt's end, see that every checkpoint is whole, and return whether it was killed."""
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not killed and os.waitstatus_to_exitcode(status) != 0:
        sys.exit("an attempt ended with an error")
    for path in checkpoints.checkpoints_in(folder):
        if wrong := checkpoints.what_is_wrong(path):
            sys.exit(f"{path}: {wrong}")
    return killed


def main(folder, how, first, last):
    """Run through once undisturbed, in FOLDER/straight; then kill, and run through at last, in FOLDER/killed."""
    straight, killed = folder / "straight", folder / "killed"
    straight.mkdir()
    killed.mkdir()
    n_steps = N_STEPS[how]
    end(straight, attempt(straight, n_steps))
    generator = random.Random(last)
    n_killed = n_writing = 0
    for n in range(first if how == "random" else last - first + 1):
        pid = attempt(killed, n_steps, None if how == "random" else first + n)
        if how == "random":
            time.sleep(generator.uniform(0.05, 1.5))
            os.kill(pid, signal.SIGKILL)
        n_killed += end(killed, pid)
        n_writing += (killed / checkpoints.STAGING).exists()
        if (killed / "result.json").exists():
            # It came through before it was killed: begin anew.
            shutil.rmtree(killed)
            killed.mkdir()
    if end(killed, attempt(killed, n_steps)):
        sys.exit("the last attempt was killed by something else")
    print(f"killed {n_killed}, while writing {n_writing}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

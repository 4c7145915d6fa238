"""Workers for the runner's tests; importable by name, as a worker in another process must be."""

import dataclasses
import math
import os
import signal
import time

from fastln.bench.results import Checked, Job, Quality, Steps
from fastln.errors import FastLNError


def work(job: Job) -> Checked | Steps | Quality:
    """End well; the numbers tell the job."""
    if job.kind == "check":
        return Checked(f"{job.model} in full", random_weights=job.model == "random", data_name="d", synthetic=False)
    if job.kind == "quality":
        accuracy = {"all": 50.0, "closed": 60.0, "open": 40.0, "n_all": 10, "n_closed": 5, "n_open": 5}
        head_alone = job.method == "head"
        return Quality(accuracy, job.suite.head_epochs, epochs=0 if head_alone else job.suite.epochs)
    saved = 100 if job.round == 1 else None
    return Steps((0.1 * job.round, 0.2 * job.round), 1000 + job.round, "process peak RSS", saved, 10, 1000, 1.5)


def predicts(job: Job) -> Checked | Steps | Quality:
    """End well, with a predicted peak and what a budget chose."""
    outcome = work(job)
    if not isinstance(outcome, Steps):
        return outcome
    note = "again in 2 blocks" if job.memory_budget else None
    return dataclasses.replace(outcome, predicted_peak_bytes=1100, storage_note=note)


def raises_in_round_2(job: Job) -> Checked | Steps | Quality:
    """Fail as a bug would, for one method."""
    if job.method == "lora" and job.round == 2:
        raise RuntimeError("the mat is torn")
    return work(job)


def dies(job: Job) -> Checked | Steps | Quality:
    """Go as the kernel's memory killer has it, for one method."""
    if job.method == "full" and job.kind == "speed":
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return work(job)


def exits(job: Job) -> Checked | Steps | Quality:
    """End without a result."""
    if job.kind == "speed":
        os._exit(7)
    return work(job)


def same_name(job: Job) -> Checked | Steps | Quality:
    """Call every model the same."""
    return Checked("m", False, "d", False) if job.kind == "check" else work(job)


def user_error(job: Job) -> Checked | Steps | Quality:
    """Find the model wanting."""
    raise FastLNError(f"no model called {job.model}")


def diverges(job: Job) -> Checked | Steps | Quality:
    """End with a loss that is no number."""
    outcome = work(job)
    return dataclasses.replace(outcome, final_loss=math.nan) if isinstance(outcome, Steps) else outcome


def quality_fails(job: Job) -> Checked | Steps | Quality:
    """Measure steps, fail to train."""
    if job.kind == "quality" and job.method == "lora":
        raise ValueError("diverged")
    return work(job)


def answer(value: object) -> object:
    """Return what was given."""
    return value


def unpicklable() -> object:
    """Return what no pipe carries."""
    return lambda: None


def sleep() -> None:
    """Take far too long."""
    time.sleep(600)


def process() -> tuple[int, int]:
    """Return this process's number, and how many threads it began with."""
    return os.getpid(), len(os.listdir("/proc/self/task"))

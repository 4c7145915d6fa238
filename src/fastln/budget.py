"""Activations fitted to a budget of memory: for each block the storage mode that costs least time, so that a step fits.

All is predicted on the meta device, by the code that runs: the model's outline is prepared with a mode, and
`fastln.peak` follows a step of it. One such run per mode says what each block keeps, and how much time the mode adds
(`fastln.step_time`). From these, paths lead from exact storage in every block to the least memory: each of their steps
gives one block another mode, first where a byte that is saved costs the least time. Of the points whose peak is below
the budget, the fastest is taken. So a smaller budget never gives a larger peak.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastln.decision import Plan
from fastln.devices import Device
from fastln.errors import FastLNError
from fastln.families.parts import block_name, blocks_of
from fastln.machine import memory_limit
from fastln.ops.settings import STORAGES
from fastln.peak import StepMemory, by_layer
from fastln.sizes import parse_bytes
from fastln.standins.storage import set_storage
from fastln.step_time import step_memory_and_work, step_seconds

logger = logging.getLogger(__name__)

Storages = Mapping[str, str]
"""The storage modes of blocks, by their names."""


def settle_budget(given: float | str, device: torch.device) -> int:
    """Return a budget in bytes.

    Args:
        given: Bytes, a size such as "8GiB", or a share of the device's memory, above 0 and up to 1.
        device: The device that the model will run on.

    Raises:
        FastLNError: If it is none of these.
    """
    if isinstance(given, bool) or not isinstance(given, int | float | str):
        raise FastLNError(
            f"memory_budget is {given!r}; it must be bytes, a size such as '8GiB', or a share from 0 to 1"
        )
    if isinstance(given, str) and re.fullmatch(r"0?\.\d+", given.strip()):
        given = float(given)
    if isinstance(given, float) and given <= 1:
        if not given > 0:
            raise FastLNError(f"memory_budget is {given}; a share of the device's memory must be above 0")
        return int(given * _memory_of(device))
    return parse_bytes(int(given) if isinstance(given, float) else given)


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu":
        return memory_limit().n_bytes
    raise FastLNError(f"memory_budget: a share of the memory of {device} is not known here; give bytes, or '8GiB'")


def outline_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model with its parameters and buffers on the meta device, where they take no memory."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        made = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class Fit:
    """A mix of storage modes that fits.

    Attributes:
        storages: The blocks whose storage is not exact, each with its mode.
        memory: The memory of a step with it.
        extra: The time that it adds, as a share of that of a step with exact storage.
    """

    storages: tuple[tuple[str, str], ...]
    memory: StepMemory
    extra: float

    def describe(self, n_bytes: int) -> str:
        """Say in one line what was chosen and what it costs."""
        modes: dict[str, int] = {}
        for _, mode in self.storages:
            modes[mode] = modes.get(mode, 0) + 1
        mix = " and ".join(f"{mode} in {count} block{'s' * (count > 1)}" for mode, count in modes.items())
        mix = mix or "exact storage everywhere"
        return (
            f"memory budget {_gib(n_bytes)}: {mix}; predicted peak {_gib(self.memory.peak)}, "
            f"{100 * self.extra:.0f}% more time than with exact storage"
        )


class Step(NamedTuple):
    """A step that was counted on the meta device.

    Attributes:
        memory: Its memory.
        storages: The storage modes of blocks.
        seconds: Its predicted time.
    """

    memory: StepMemory
    storages: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class Planner:
    """What `fit` needs of `fastln.plan`.

    Attributes:
        plan: Decides, for a model with these storage modes of blocks.
        apply: Carries a plan out.
        restore: Undoes it.
        modes: The storage modes to choose from.
        device: What a step's time is predicted for.
    """

    plan: Callable[[nn.Module, Storages], Plan]
    apply: Callable[[Plan, nn.Module], None]
    restore: Callable[[nn.Module], object]
    modes: Sequence[str]
    device: Device

    def measure(self, outline: nn.Module, batch: Mapping[str, Any], storages: Storages) -> Step:
        """Count a step with these storage modes of blocks."""
        self.apply(self.plan(outline, storages), outline)
        try:
            memory, work = step_memory_and_work(outline, batch)
        finally:
            self.restore(outline)
        return Step(memory, dict(storages), step_seconds(work, self.device).total)


def fit(outline: nn.Module, batch: Mapping[str, Any], n_bytes: int, planner: Planner) -> Fit:
    """Choose storage modes of blocks so that a step's peak is below a budget, at the least cost.

    Args:
        outline: The stock model, on the meta device, in training mode.
        batch: The model's arguments.
        n_bytes: The budget.
        planner: How to plan.

    Raises:
        FastLNError: If nothing fits. It says the least that would, and the largest batch that does.
    """
    exact = planner.measure(outline, batch, {})
    if exact.memory.peak <= n_bytes:
        return Fit((), exact.memory, 0.0)
    blocks = list(blocks_of(outline))
    uniform = {mode: planner.measure(outline, batch, dict.fromkeys(blocks, mode)) for mode in planner.modes}
    least = min(uniform.values(), key=lambda step: step.memory.peak, default=exact)
    # What is computed again as a whole has all of its results at once for a while. So it may be better without.
    parts = {mode: step for mode, step in uniform.items() if STORAGES[mode].block is None}
    mixes = [mix for modes in (parts, uniform) for mix in _path(blocks, modes, exact)]
    for mix in sorted(mixes, key=lambda mix: mix.extra):
        if mix.peak <= n_bytes:
            memory = planner.measure(outline, batch, mix.storages).memory
            if memory.peak <= n_bytes:
                return Fit(tuple(mix.storages.items()), memory, mix.extra)
            least = min(least, Step(memory, mix.storages, 0.0), key=lambda step: step.memory.peak)
    known = "" if blocks else "no block of this model is known, so all of it keeps what 'exact' does; "
    raise FastLNError(
        f"memory_budget {_gib(n_bytes)} is too little for this batch: the least that training it takes is "
        f"{_gib(least.memory.peak)} (weights {_gib(least.memory.weights)}); {known}"
        f"{_largest(outline, batch, n_bytes, planner, least.storages)}"
    )


class _Mix(NamedTuple):
    """A point of a path.

    Attributes:
        storages: The modes of blocks.
        peak: About what a step with them takes.
        extra: The time that they add, as a share of that of a step with exact storage.
    """

    storages: dict[str, str]
    peak: int
    extra: float


def _path(blocks: Sequence[str], uniform: Mapping[str, Step], exact: Step) -> Iterator[_Mix]:
    """Yield mixes, from exact storage to the least that is kept.

    Args:
        blocks: The blocks.
        uniform: For each mode to choose from, a step with it in every block.
        exact: A step with exact storage.
    """
    kept = _per_block(exact.memory, blocks)
    total = sum(kept.values()) or 1
    options: dict[str, list[tuple[int, float, str]]] = {block: [(0, 0.0, "exact")] for block in blocks}
    above = {}  # how much more the peak is than what is kept accounts for
    for mode, step in uniform.items():
        extra = max(step.seconds / exact.seconds - 1, 0.0)
        left = _per_block(step.memory, blocks)
        above[mode] = max(step.memory.peak - (exact.memory.peak - total + sum(left.values())), 0)
        for block in blocks:
            options[block].append((kept[block] - left[block], extra * kept[block] / total, mode))
    steps = []
    for index, block in enumerate(blocks):
        for (saved, cost, _), (next_saved, next_cost, mode) in itertools.pairwise(_hull(options[block])):
            slope = (next_cost - cost) / (next_saved - saved)
            steps.append((slope, index, next_saved - saved, next_cost - cost, mode))
    storages: dict[str, str] = {}
    peak, all_extra = exact.memory.peak, 0.0
    for _, index, saved, cost, mode in sorted(steps, key=lambda step: step[:2]):
        storages[blocks[index]] = mode
        peak, all_extra = peak - saved, all_extra + cost
        yield _Mix(dict(storages), peak + max(above[mode] for mode in storages.values()), all_extra)


def _hull(options: list[tuple[int, float, str]]) -> list[tuple[int, float, str]]:
    """Return the options from no saving to the largest, each the one at which a further byte costs least."""
    hull = [options[0]]
    while further := [option for option in options if option[0] > hull[-1][0]]:
        hull.append(min(further, key=lambda option: (_slope(hull[-1], option), -option[0])))
    return hull


def _slope(a: tuple[int, float, str], b: tuple[int, float, str]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _per_block(memory: StepMemory, blocks: Sequence[str]) -> dict[str, int]:
    kept = dict.fromkeys(blocks, 0)
    for layer, size in by_layer(memory.kept).items():
        if (block := block_name(layer)) in kept:
            kept[block] += size
    return kept


def _largest(outline: nn.Module, batch: Mapping[str, Any], n_bytes: int, planner: Planner, storages: Storages) -> str:
    """Say the largest part of a batch that fits with the modes that keep least."""
    sizes = {value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.ndim}
    n_samples = max(sizes, default=1)
    low, high = 0, n_samples
    while high - low > 1:
        middle = (low + high) // 2
        part = {
            key: value[:middle] if isinstance(value, Tensor) and value.ndim and value.shape[0] == n_samples else value
            for key, value in batch.items()
        }
        memory = planner.measure(outline, part, storages).memory
        low, high = (middle, high) if memory.peak <= n_bytes else (low, middle)
    return f"a batch of {low} (of {n_samples}) fits" if low else "not even a batch of one fits"


@dataclass
class AtFirstBatch:
    """Chooses the storage modes of a prepared model's blocks when it knows how large a batch is.

    That is at the first training step, and again whenever a batch is larger than all before.

    Attributes:
        model: The model.
        n_bytes: The budget.
        planner: How to plan.
        outline: The stock model, without its values.
        largest: The size of the largest batch so far.
        storages: The modes that it decided on.
        handle: The handle of the registered hook.
        undo: What undoes the changes of whole blocks.
        found: What was chosen last.
    """

    model: nn.Module
    n_bytes: int
    planner: Planner
    outline: nn.Module | None = None
    largest: int = 0
    storages: dict[str, str] = field(default_factory=dict)
    handle: RemovableHandle | None = None
    undo: list[Any] = field(default_factory=list)
    found: Fit | None = None

    def put(self) -> None:
        """Take the outline of the stock model, and wait for a batch."""
        self.outline = outline_of(self.model)
        self.handle = self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def remove(self) -> None:
        """Stop waiting."""
        if self.handle is not None:
            self.handle.remove()
        for block in reversed(self.undo):
            block.remove()
        self.undo, self.outline = [], None

    @property
    def decision(self) -> dict[str, Any]:
        """What was decided, for a training that resumes: later batches may be smaller than those that decided."""
        return {"n_bytes": self.n_bytes, "largest": self.largest, "storages": self.storages}

    def decide_as(self, decision: Mapping[str, Any]) -> None:
        """Decide as before.

        Args:
            decision: The `decision` of the training that resumes.
        """
        if decision["n_bytes"] != self.n_bytes:
            logger.warning(
                "the training to resume had a memory budget of %s, now it is %s: the next batch decides anew what "
                "blocks keep",
                _gib(decision["n_bytes"]),
                _gib(self.n_bytes),
            )
            return
        self.largest = decision["largest"]
        self._put(decision["storages"])

    def _put(self, storages: Mapping[str, str]) -> None:
        assert self.outline is not None
        for block in reversed(self.undo):
            block.remove()
        self.storages = dict(storages)
        self.undo = set_storage(self.model, self.planner.plan(self.outline, self.storages))

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled() or self.outline is None:
            return
        if torch.compiler.is_compiling():
            if not self.largest:
                _say_that_nothing_decides()
            return
        batch = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        batch = {name: value for name, value in batch.items() if name != "self"}
        batch |= batch.pop("kwargs", {})
        size = sum(value.numel() for value in batch.values() if isinstance(value, Tensor))
        if size <= self.largest:
            return
        self.outline.train()
        if self.largest and self.planner.measure(self.outline, batch, self.storages).memory.peak <= self.n_bytes:
            self.largest = size  # what was decided is enough
            return
        found = fit(self.outline, batch, self.n_bytes, self.planner)
        self.found = found
        logger.warning("%s", found.describe(self.n_bytes))
        self._put(dict(found.storages))
        self.largest = size


@torch.compiler.assume_constant_result  # so it is called while code is compiled, and is no part of that code
def _say_that_nothing_decides() -> None:
    _say()


@functools.cache
def _say() -> None:
    logger.warning(
        "memory_budget: the first batch cannot decide in compiled code, so all blocks keep what 'exact' does: give "
        "fastln.prepare a `batch`, or run a step before torch.compile"
    )


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"

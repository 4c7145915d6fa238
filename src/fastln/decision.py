"""The plan as data: for each module that fastln recognises, what changes or stays stock, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fastln.ops import OpSettings


@dataclass(frozen=True)
class Change:
    """One change that `prepare` makes.

    Attributes:
        name: The module's name in the model; empty for the model itself.
        kind: What the module is, in words for the user: LayerNorm, gated MLP, attention, ...
        stand_in: What replaces it: a key of `fastln.standins.table.STAND_INS`.
        becomes: What replaces it, in words for the user.
        trick: The name for `without` that leaves this change out; None if it cannot be left out.
        keeps: What it keeps for backward.
        products: The form in which its matrix products run; None if it has none.
        storage: The storage mode of its operations.
        why_exact: Why its products are exact although 8 bits were asked for; None if they are not, or were not.
        reason: Why it changes.
        stock: The module's stock class.
        detail: What the stand-in needs to know, such as which norm to compute.
        dtypes: The module's own parameters that become float32: each name with its current dtype.
    """

    name: str
    kind: str
    stand_in: str
    becomes: str
    trick: str | None
    keeps: str
    products: str | None
    reason: str
    stock: str
    detail: Any = None
    dtypes: tuple[tuple[str, torch.dtype], ...] = ()
    why_exact: str | None = None
    storage: str = "exact"


@dataclass(frozen=True)
class Stay:
    """A module of a kind that fastln knows but leaves stock.

    Attributes:
        name: The module's name in the model.
        kind: What the module is, in words for the user.
        reason: Why it stays stock.
    """

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What `prepare` will change in a model, and what trains. Plans with equal contents are equal.

    Attributes:
        model: The model's class.
        method: The tuning method: a name or notation that `fastln.methods.get_method` takes.
        scope: Names of the sub-models to tune; None for all.
        also: Names of further modules that train in full: those that the caller named, and random heads.
        device: The device that the model will run on, as torch writes it.
        settings: How operations will run.
        without: Names of the changes that are left out.
        trained: Names of the parameters that train.
        n_trained: The number of elements in the trained parameters, counting shared ones once.
        n_total: The number of elements in all parameters, counting shared ones once.
        changes: The changes, in the order in which they are made.
        stays: What stays stock, with the reasons.
        notes: Other things the user should know, one sentence each.
        storages: The blocks whose storage mode is not that of the settings, each with its mode.
        keep_weights: Whether the weights that 8-bit ones replace stay in memory.
        n_bytes: A memory budget, if the first batch is to decide what each block keeps.
    """

    model: str
    method: str
    scope: tuple[str, ...] | None
    also: tuple[str, ...]
    device: str
    settings: OpSettings
    without: tuple[str, ...]
    trained: frozenset[str]
    n_trained: int
    n_total: int
    changes: tuple[Change, ...]
    stays: tuple[Stay, ...]
    notes: tuple[str, ...] = ()
    storages: tuple[tuple[str, str], ...] = ()
    keep_weights: bool = False
    n_bytes: int | None = None

    def __str__(self) -> str:
        return self.table()

    def table(self) -> str:
        """Return the plan as readable text: what trains, what changes and what stays stock, grouped by kind."""
        rows = [("", "what", "becomes", "keeps for backward", "products", "left out by")]
        rows += [
            (str(count), kind, becomes, keeps, products or "-", f"without={trick!r}" if trick else "-")
            for (kind, becomes, keeps, products, trick), count in self._groups().items()
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [self._headline()]
        for count, *cells in rows:
            padded = [cell.ljust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append(f"  {count.rjust(widths[0])} {'  '.join(padded)}".rstrip())
        stays = Counter((stay.kind, stay.reason) for stay in self.stays)
        lines += ["stays stock:"] if stays else ["stays stock: nothing that fastln knows"]
        lines += [f"  {count} {kind}: {reason}" for (kind, reason), count in stays.items()]
        exact = Counter((change.kind, change.why_exact) for change in self.changes if change.why_exact)
        lines += ["products stay exact:"] if exact else []
        lines += [f"  {count} {kind}: {reason}" for (kind, reason), count in exact.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def summary(self) -> list[str]:
        """Return the plan in at most five lines, for the log. It leaves out the notes, which are logged as warnings."""
        becomes = Counter(
            (
                change.kind,
                f"{change.becomes}, {change.products}" if "int8" in (change.products or "") else change.becomes,
            )
            for change in self.changes
        )
        parts = [f"{_counted(count, kind)} → {what}" for (kind, what), count in becomes.items()]
        lines = [self._headline(), f"changes: {'; '.join(parts) or 'nothing'}"]
        slow = [change for change in self.changes if change.stand_in == "slow_norm"]
        if slow:
            names = ", ".join(f"{change.name} ({change.kind})" for change in slow[:9])
            more = f" and {len(slow) - 9} more" if len(slow) > 9 else ""
            reasons = "; ".join(dict.fromkeys(change.reason for change in slow))
            lines.append(f"trains with stock code: {names}{more}: {reasons}")
        if heads := [change.name for change in self.changes if change.stand_in == "random_head"]:
            lines.append(describe_random_heads(heads))
        if stays := Counter((stay.kind, stay.reason) for stay in self.stays):
            parts = [f"{_counted(count, kind)} ({reason})" for (kind, reason), count in stays.items()]
            lines.append(f"stays stock: {'; '.join(parts)}")
        return lines

    def _headline(self) -> str:
        share = 100 * self.n_trained / max(self.n_total, 1)
        settings = f"backend {self.settings.backend}, activations {self._activations()}, "
        settings += f"products {self.settings.products}"
        lost = sum(getattr(change.detail, "keep", True) is False for change in self.changes)
        if lost:
            settings += (
                f" (the original weights of {lost} layers are not kept: restore() will refuse; keep_weights keeps them)"
            )
        return (
            f"{self.model}, method {self.method}: {self.n_trained:,} of {self.n_total:,} parameters train "
            f"({share:.4g}%); device {self.device}, {settings}"
        )

    def _activations(self) -> str:
        blocks = Counter(mode for _, mode in self.storages)
        parts = (f"{mode} in {_counted(count, 'block')}" for mode, count in blocks.items())
        return " and ".join((self.settings.storage, *parts))

    def _groups(self) -> Counter[tuple[str, str, str, str | None, str | None]]:
        return Counter(
            (change.kind, change.becomes, change.keeps, change.products, change.trick) for change in self.changes
        )


def describe_random_heads(heads: Iterable[str]) -> str:
    """Describe, in one line, heads that train whole because no checkpoint gave their values."""
    return f"trains whole, because the checkpoint lacks it: {', '.join(heads)} (without='random_heads' freezes it)"


def _counted(count: int, kind: str) -> str:
    counts = (
        count > 1 and kind[-1] not in "s)" and not kind.startswith(("attention", "dtype", "dropout", "cache", "memory"))
    )
    return f"{count} {kind}{'s' if counts else ''}"

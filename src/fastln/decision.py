"""What a plan is: data that says of each thing that fastln knows in a model what becomes of it, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from fastln.ops import OpSettings


@dataclass(frozen=True)
class Change:
    """One thing that `prepare` changes.

    Attributes:
        name: Of the module, in the model; empty for the model itself.
        kind: What the module is, for a user: LayerNorm, gated MLP, attention, ...
        stand_in: What takes its place: a key of `fastln.standins.table.STAND_INS`.
        becomes: The same for a user.
        trick: The name by which `without` leaves it out; None where it is owed.
        keeps: What is kept of it for backward.
        products: In which form its matrix products run; None where it has none.
        reason: Why it changes.
        stock: The module's class.
        detail: What the stand-in must know, such as which norm it computes.
        dtypes: Names of its own parameters that become float32, each with the dtype that it has.
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


@dataclass(frozen=True)
class Stay:
    """One thing that stays stock although fastln knows its kind.

    Attributes:
        name: Of the module, in the model.
        kind: What it is, for a user.
        reason: Why it stays.
    """

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What `prepare` will change in a model, and what trains. Two plans are equal if they say the same.

    Attributes:
        model: The model's class.
        method: What trains, as `fastln.methods` has it.
        also: Names of further modules that train whole.
        device: Where the model will be, as torch writes it.
        settings: How operations will run.
        without: Names of what is left out.
        trained: Names of the parameters that train.
        n_trained: How many numbers these have, and `n_total` how many all parameters have, shared ones counted once.
        changes: What changes, in the order in which it is done.
        stays: What stays stock, with the reason.
        notes: What else a user should know, a sentence each.
    """

    model: str
    method: str
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

    def table(self) -> str:
        """Return the plan for a person: what trains, what changes and what stays, grouped by kind."""
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
        lines += ["stays stock:"] if stays else ["nothing that fastln knows stays stock"]
        lines += [f"  {count} {kind}: {reason}" for (kind, reason), count in stays.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def summary(self) -> list[str]:
        """Return the plan in four lines or fewer, for the log; notes are warnings of their own."""
        becomes = Counter((change.kind, change.becomes) for change in self.changes)
        parts = [f"{_counted(count, kind)} → {what}" for (kind, what), count in becomes.items()]
        lines = [self._headline(), f"changes: {'; '.join(parts) or 'nothing'}"]
        slow = [change for change in self.changes if change.stand_in == "slow_norm"]
        if slow:
            names = ", ".join(f"{change.name} ({change.kind})" for change in slow[:9])
            more = f" and {len(slow) - 9} more" if len(slow) > 9 else ""
            lines.append(f"tuned with stock code: {names}{more}: {slow[0].reason}")
        if stays := Counter((stay.kind, stay.reason) for stay in self.stays):
            parts = [f"{_counted(count, kind)} ({reason})" for (kind, reason), count in stays.items()]
            lines.append(f"stays stock: {'; '.join(parts)}")
        return lines

    def _headline(self) -> str:
        share = 100 * self.n_trained / max(self.n_total, 1)
        settings = (
            f"backend {self.settings.backend}, activations {self.settings.storage}, products {self.settings.products}"
        )
        return (
            f"{self.model}, method {self.method}: {self.n_trained:,} of {self.n_total:,} parameters train "
            f"({share:.4g}%); device {self.device}, {settings}"
        )

    def _groups(self) -> Counter[tuple[str, str, str, str | None, str | None]]:
        return Counter(
            (change.kind, change.becomes, change.keeps, change.products, change.trick) for change in self.changes
        )


def _counted(count: int, kind: str) -> str:
    counts = count > 1 and kind[-1] not in "s)" and not kind.startswith(("attention", "dropout", "cache", "memory"))
    return f"{count} {kind}{'s' if counts else ''}"

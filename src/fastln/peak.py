"""The memory of a whole training step: what lives at its peak, by kind.

A step runs once, on any device. On the meta device that takes no memory, and seconds for a model of billions of
parameters. The words are those of `fastln.memory`; what is in none of its kinds at the peak is *workspace*.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.utils._pytree import tree_leaves, tree_map_only

from fastln.errors import FastLNError
from fastln.lifetimes import Block, Record
from fastln.memory import MASTER, AsOnCPU, Footprint, footprint, held_by
from fastln.ops.rounded import forget_rows


class Saved(NamedTuple):
    """What autograd keeps for one kind of operation in one layer.

    Attributes:
        kind: What the operation is: "norm", "attention", "activation", "linear", "dropout", "loss" and so on; for one
            that is in no such group, its own name, such as "mul".
        layer: The name of the block that ran, such as "model.layers.3", or of the module outside of all blocks.
        n_bytes: Its size. A tensor that several operations keep counts once, for the first of them.
    """

    kind: str
    layer: str
    n_bytes: int


@dataclass(frozen=True)
class StepMemory:
    """The memory of a training step at its peak, in bytes, without libraries. All is predicted.

    Attributes:
        weights: As in `Footprint`.
        gradients: Those of trained parameters that existed at the peak.
        optimizer: As in `Footprint`.
        batch: The step's inputs.
        saved: What autograd kept at the peak, by kind of operation and by layer.
        workspace: All the rest at the peak: results that are about to be used, gradients that pass through.
        phase: When the peak was: "forward", "backward" or "optimizer".
        kept: What autograd keeps between forward and backward, as `saved`. Some of it may be gone at the peak.
        footprint: The same step without workspace: all gradients, and all of `kept`.
    """

    weights: int
    gradients: int
    optimizer: int
    batch: int
    saved: tuple[Saved, ...]
    workspace: int
    phase: str
    kept: tuple[Saved, ...]
    footprint: Footprint

    @property
    def peak(self) -> int:
        """All that lived at the peak."""
        return self.weights + self.gradients + self.optimizer + self.batch + self.saved_bytes + self.workspace

    @property
    def saved_bytes(self) -> int:
        """What autograd kept at the peak."""
        return sum(part.n_bytes for part in self.saved)

    def describe(self) -> str:
        """Format the sizes as two lines, in MiB: what lived at the peak, and what was saved by kind of operation."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "batch": self.batch,
            "saved for backward": self.saved_bytes,
            "workspace": self.workspace,
        }
        lines = [f"peak {self.peak / 2**20:,.1f} MiB in the {self.phase}, predicted: {_listed(parts)}"]
        if self.kept:
            saved = f"saved from forward to backward, {self.footprint.saved / 2**20:,.1f} MiB"
            lines.append(f"{saved}: {_listed(by_kind(self.kept))}")
        return "\n".join(lines)


def by_kind(saved: tuple[Saved, ...]) -> dict[str, int]:
    """Return the bytes of each kind of operation, the largest first."""
    return _summed((part.kind, part.n_bytes) for part in saved)


def by_layer(saved: tuple[Saved, ...]) -> dict[str, int]:
    """Return the bytes of each layer, in the order in which they ran."""
    sizes: Counter[str] = Counter()
    for part in saved:
        sizes[part.layer] += part.n_bytes
    return dict(sizes)


def step_memory(model: nn.Module, batch: Mapping[str, Any], *, optimizer: bool = True) -> StepMemory:
    """Run one training step, forward and backward, and return what lived at its peak.

    The optimizer does not run: its memory is `Footprint`'s, and its own workspace, the float32 copies of all gradients
    of lower precision, is added after the backward pass.

    What an operation allocates and frees inside itself is not seen; for a CPU `fastln.workspace` adds what counts of
    it. On the meta device the step is that of a CPU, with the exceptions that `SavedActivations` lists.

    Args:
        model: Stock, peft's or prepared, in training mode, on any device. Its parameters, gradients and mode are the
            same afterwards; on a real device it draws random numbers and updates running statistics, as a step does.
        batch: The model's arguments. Without labels the loss is the mean of the first tensor that the model returns.
            For a model on the meta device they may be on any device.
        optimizer: Whether `fastln.training`'s AdamW trains the parameters that require a gradient; else nothing does.

    Raises:
        FastLNError: If nothing trains, or nothing that the model returns depends on it.
    """
    forget_rows()  # other models'
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise FastLNError("nothing in this model trains, so it has no training step")
    is_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    inputs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), dict(batch)) if is_meta else dict(batch)
    held = list(held_by(model))  # lives until the end, because some of it stands for what a first step will make
    on_cpu = all(tensor.is_meta or tensor.is_cpu for tensor in held)
    record = Record(model, on_cpu)
    record.mark("weights", held)
    record.mark("batch", (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)))
    sizes = footprint(model, saved=0)
    sizes = sizes if optimizer else replace(sizes, optimizer=0)
    with without_gradients(trained), AsOnCPU() if is_meta else nullcontext(), record:
        with record.forward():
            loss = loss_of(model(**inputs))
        n_forward = len(record.events)
        run_backward(loss)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        record.mark("gradients", gradients)
        n_backward = len(record.events)
        if optimizer:
            copies = sum(MASTER * gradient.numel() for gradient in gradients if gradient.dtype != torch.float32)
            record.add(copies)
    forget_rows()
    return _at_peak(record, n_forward, n_backward, sizes)


def loss_of(output: Any) -> Tensor:
    """Return the loss of a model's output; else the mean of its first tensor, as a caller's own loss would read it.

    Raises:
        FastLNError: If there is no such tensor through which a gradient could pass.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else None
    if isinstance(loss, Tensor):
        return loss
    for x in tree_leaves(output):
        if isinstance(x, Tensor) and x.requires_grad:
            return x.float().mean()
    raise FastLNError("the model returns nothing that depends on what trains, so this batch makes no training step")


def run_backward(loss: Tensor) -> None:
    """Do as `loss.backward()`, which would suspend `AsOnCPU`. Layers that are computed again need that."""
    _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)


@contextmanager
def without_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Set gradients aside, as they are at the beginning of a step."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def _at_peak(record: Record, n_forward: int, n_backward: int, sizes: Footprint) -> StepMemory:
    """Return what lived at the peak.

    Args:
        record: Of the step.
        n_forward: The number of events until the end of the forward pass.
        n_backward: Likewise of the backward pass.
        sizes: The step's footprint, without what is saved.
    """
    changes = record.changes()
    totals = list(itertools.accumulate(blocks + rows for blocks, rows in changes))
    last = max(range(len(totals)), key=totals.__getitem__)
    at_peak, kept = record.living(last + 1), _saved(record, record.living(n_forward))
    parts = Counter(workspace=sum(rows for _, rows in changes[: last + 1]))
    for block in at_peak:
        parts[block.kind or ("workspace" if block.saved is None else "saved")] += block.size
    return StepMemory(
        weights=parts["weights"],
        gradients=parts["gradients"],
        optimizer=sizes.optimizer,
        batch=parts["batch"],
        saved=_saved(record, at_peak),
        workspace=parts["workspace"],
        phase="forward" if last < n_forward else "backward" if last < n_backward else "optimizer",
        kept=kept,
        footprint=replace(sizes, saved=sum(part.n_bytes for part in kept)),
    )


def _saved(record: Record, blocks: list[Block]) -> tuple[Saved, ...]:
    sizes: Counter[tuple[str, str]] = Counter()
    for block in sorted(blocks, key=lambda block: block.node):
        if block.saved is not None and not block.kind:
            kind = _kind(record.operations.get(block.node, "other"), block.saved.module)
            sizes[kind, block.saved.layer] += block.size
    return tuple(Saved(kind, layer, size) for (kind, layer), size in sizes.items() if size)


# Parts of operators' names, and the kind of operation that saves for backward under this name. The first that fits.
_KINDS = {
    "log_softmax": "loss",
    "nll_loss": "loss",
    "cross_entropy": "loss",
    "dropout": "dropout",
    "bernoulli": "dropout",
    "norm": "norm",
    "attention": "attention",
    "softmax": "attention",
    "rotary": "rotary",
    "gated": "activation",
    "activation": "activation",
    "gelu": "activation",
    "silu": "activation",
    "relu": "activation",
    "tanh": "activation",
    "sigmoid": "activation",
    "linear": "linear",
    "mm": "linear",
    "convolution": "convolution",
    "embedding": "embedding",
}


# Parts of modules' names, and the kind of their operations that are not in the table above.
_KINDS_OF_MODULES = {"norm": "norm", "rotary": "rotary", "attention": "attention", "mlp": "activation"}


def _kind(operation: str, module: str) -> str:
    name = operation.rpartition("::")[2]
    found = (kind for part, kind in _KINDS.items() if part in name)
    by_module = (kind for part, kind in _KINDS_OF_MODULES.items() if part in module)
    return next(itertools.chain(found, by_module), name)


def _summed(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    summed: Counter[str] = Counter()
    for name, size in sizes:
        summed[name] += size
    return dict(summed.most_common())


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in sizes.items())

"""The memory of a whole training step: what lives at its peak, by kind.

A step runs once, on any device. On the meta device that takes no memory, and seconds for a model of billions of
parameters. The words are those of `fastln.memory`; what is in none of its kinds at the peak is *workspace*.
"""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch.autograd.graph import _engine_run_backward, saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map_only

from fastln.errors import FastLNError
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
    """

    weights: int
    gradients: int
    optimizer: int
    batch: int
    saved: tuple[Saved, ...]
    workspace: int
    phase: str
    kept: tuple[Saved, ...]

    @property
    def peak(self) -> int:
        """All that lived at the peak."""
        return self.weights + self.gradients + self.optimizer + self.batch + self.saved_bytes + self.workspace

    @property
    def saved_bytes(self) -> int:
        """What autograd kept at the peak."""
        return sum(part.n_bytes for part in self.saved)

    @property
    def footprint(self) -> Footprint:
        """The same step, with all trained parameters' gradients there and all that is kept for backward."""
        return Footprint(self.weights, self.gradients, self.optimizer, sum(part.n_bytes for part in self.kept))

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
            total = sum(part.n_bytes for part in self.kept)
            lines.append(f"saved from forward to backward, {total / 2**20:,.1f} MiB: {_listed(by_kind(self.kept))}")
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

    What is not seen is what an operation allocates and frees inside itself. On the meta device the step is that of a
    CPU, with the exceptions that `SavedActivations` lists.

    Args:
        model: Stock, peft's or prepared, in training mode, on any device. Its parameters, gradients and mode are the
            same afterwards; on a real device it draws random numbers and updates running statistics, as a step does.
        batch: The model's arguments, with labels. For a model on the meta device they may be on any device.
        optimizer: Whether `fastln.training`'s AdamW trains the parameters that require a gradient; else nothing does.

    Raises:
        FastLNError: If the model returns no loss, or nothing trains.
    """
    forget_rows()  # other models'
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise FastLNError("nothing in this model trains, so it has no training step")
    is_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    inputs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), dict(batch)) if is_meta else dict(batch)
    held = list(held_by(model))  # lives until the end, because some of it stands for what a first step will make
    record = _Record(model)
    record.mark("weights", held)
    record.mark("batch", (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)))
    keeps = footprint(model, saved=0).optimizer if optimizer else 0
    with _without_gradients(trained), AsOnCPU() if is_meta else nullcontext(), record:
        with record.forward():
            loss = _loss(model(**inputs))
        n_forward = len(record.events)
        # As `loss.backward()`, which would suspend `AsOnCPU`. Layers that are computed again need that.
        _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        record.mark("gradients", gradients)
        n_backward = len(record.events)
        if optimizer:
            copies = sum(MASTER * gradient.numel() for gradient in gradients if gradient.dtype != torch.float32)
            record.events.append((_Block(copies), +1))
    forget_rows()
    return record.summary(n_forward, n_backward, keeps)


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else None
    if not isinstance(loss, Tensor):
        raise FastLNError("the model returns no loss for this batch, so it has no training step; give it labels")
    return loss


@contextmanager
def _without_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Set gradients aside, as they are at the beginning of a step."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


class _Place(NamedTuple):
    """A module that ran: its layer, and the name of its class in lower case."""

    layer: str
    module: str


_NOWHERE = _Place("", "")


class _Block:
    """The memory of one storage.

    Attributes:
        size: In bytes.
        kind: "weights", "batch", "gradients" or "" for all the rest.
        saved: Where it was first saved for backward; None if it was not.
        node: The number of autograd's node that first saved it.
        watch: The weak reference whose callback notes its end.
    """

    __slots__ = ("kind", "node", "saved", "size", "watch")

    def __init__(self, size: int) -> None:
        self.size, self.kind = size, ""
        self.saved: _Place | None = None
        self.node = 0
        self.watch: Any = None


class _Record(TorchDispatchMode):
    """Notes when storages begin and end, and which of them are saved for backward by whom.

    A storage is known from the first operation that returns a tensor of it. torch keeps the Python object of a storage
    as long as the storage lives, so a weak reference tells when it ends, even if only C++ held it.

    Who saves a tensor follows from a number: autograd gives each node that it makes the next one, before the operation
    runs and before it saves anything.

    Attributes:
        events: Blocks, with +1 where one begins and -1 where it ends.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.events: list[tuple[_Block, int]] = []
        self._live: dict[int, _Block] = {}  # by the address of the storage's object
        modules = reversed(list(model.named_modules()))  # of a module's names the first one is kept
        self._known = {id(module): _Place(_layer(name), type(module).__name__.lower()) for name, module in modules}
        self._running: list[_Place] = []
        self._operations: dict[int, str] = {}  # by the number of the node

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, and note the storages of its results."""
        if any(issubclass(kind, Tensor) and _is_wrapper(kind) for kind in types):
            return NotImplemented  # it calls operations on the tensors in it
        if func is not torch.ops.aten.detach.default:  # which `_pack` calls, before the operation that saves
            self._operations.setdefault(_get_sequence_nr(), func.overloadpacket._qualified_op_name)
        results = func(*args, **(kwargs or {}))
        for leaf in results if isinstance(results, tuple | list) else (results,):
            if isinstance(leaf, Tensor):
                self._block(leaf)
            elif isinstance(leaf, list):
                for tensor in leaf:
                    self._block(tensor)
        return results

    def mark(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Say of what kind the storages of some tensors are."""
        for tensor in tensors:
            for part in _parts(tensor):
                block = self._block(part)
                block.kind = block.kind or kind

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Note who saves what for backward while this is open."""
        # The unpack hook outlives the context: backward calls it.
        with ExitStack() as stack:
            stack.enter_context(saved_tensors_hooks(self._pack, lambda tensor: tensor))
            stack.callback(register_module_forward_pre_hook(self._enter).remove)
            stack.callback(register_module_forward_hook(self._leave, always_call=True).remove)
            yield

    def _enter(self, module: nn.Module, _: Any) -> None:
        if (place := self._known.get(id(module))) is not None:
            self._running.append(place)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if id(module) in self._known:
            self._running.pop()

    def _pack(self, tensor: Tensor) -> Tensor:
        for part in _parts(tensor):
            block = self._block(part)
            if block.saved is None:
                block.saved, block.node = self._running[-1] if self._running else _NOWHERE, _get_sequence_nr()
        return tensor.detach()  # an undetached result would form a cycle with its own node, and never be freed

    def _block(self, tensor: Tensor) -> _Block:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        block = self._live.get(key)
        if block is not None and block.size != size:  # it was resized
            self._end(key, block)
            block = None
        if block is None:
            self._live[key] = block = _Block(size)
            block.watch = weakref.ref(storage, partial(self._end, key, block))
            self.events.append((block, +1))
        return block

    def _end(self, key: int, block: _Block, _: Any = None) -> None:
        if self._live.get(key) is block:
            del self._live[key]
            self.events.append((block, -1))

    def summary(self, n_forward: int, n_backward: int, optimizer: int) -> StepMemory:
        """Return what lived at the peak.

        Args:
            n_forward: The number of events until the end of the forward pass.
            n_backward: Likewise of the backward pass.
            optimizer: Bytes that the optimizer keeps.
        """
        sizes = itertools.accumulate(block.size * sign for block, sign in self.events)
        _, last = max((size, -index) for index, size in enumerate(sizes))
        at_peak, between = self._living(1 - last), self._living(n_forward)
        totals: Counter[str] = Counter()
        for block in at_peak:
            totals[block.kind or ("workspace" if block.saved is None else "saved")] += block.size
        return StepMemory(
            weights=totals["weights"],
            gradients=totals["gradients"],
            optimizer=optimizer,
            batch=totals["batch"],
            saved=self._saved(at_peak),
            workspace=totals["workspace"],
            phase="forward" if -last < n_forward else "backward" if -last < n_backward else "optimizer",
            kept=self._saved(between),
        )

    def _living(self, n_events: int) -> list[_Block]:
        living = dict[_Block, None]()
        for block, sign in self.events[:n_events]:
            if sign > 0:
                living[block] = None
            else:
                del living[block]
        return list(living)

    def _saved(self, blocks: list[_Block]) -> tuple[Saved, ...]:
        sizes: Counter[tuple[str, str]] = Counter()
        for block in sorted(blocks, key=lambda block: block.node):
            if block.saved is not None and not block.kind:
                kind = _kind(self._operations.get(block.node, "other"), block.saved.module)
                sizes[kind, block.saved.layer] += block.size
        return tuple(Saved(kind, layer, size) for (kind, layer), size in sizes.items() if size)


def _is_wrapper(kind: type[Tensor]) -> bool:
    return kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl and kind is not Tensor


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors with memory in a tensor: itself, or what a subclass wraps."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _parts(getattr(tensor, name))


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


def _layer(module: str) -> str:
    """Return the name of the block that a module is in, up to the first number; else the module's own name."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])


def _summed(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    summed: Counter[str] = Counter()
    for name, size in sizes:
        summed[name] += size
    return dict(summed.most_common())


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in sizes.items())

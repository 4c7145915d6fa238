"""When memory begins and ends while a model runs, and what of it is saved for backward."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from fastln.standins.part import StandIn
from fastln.workspace import inside, rows_in_8_bits, try_out


class Place(NamedTuple):
    """A module that ran: its layer, and the name of its class in lower case."""

    layer: str
    module: str


_NOWHERE = Place("", "")


class Block:
    """The memory of one storage.

    Attributes:
        size: In bytes.
        kind: "weights", "batch", "gradients" or "" for all the rest.
        made_by: The name of the operation that made it.
        begin: The number of the event with which it began.
        end: The number of the event with which it ended; None while it lives.
        saved: Where it was first saved for backward; None if it was not.
        node: The number of autograd's node that first saved it.
        watch: The weak reference whose callback notes its end.
    """

    __slots__ = ("begin", "end", "kind", "made_by", "node", "saved", "size", "watch")

    def __init__(self, size: int) -> None:
        self.size, self.kind, self.made_by, self.begin = size, "", "", 0
        self.end: int | None = None
        self.saved: Place | None = None
        self.node = 0
        self.watch: Any = None


class _Rows(NamedTuple):
    """Rows in 8 bits that are at hand.

    Attributes:
        of: The memory that they are rows of.
        begin: The number of the event after which they exist.
        size: In bytes.
    """

    of: Block
    begin: int
    size: int


class Record(TorchDispatchMode):
    """Notes when storages begin and end, and which of them are saved for backward by whom.

    A storage is known from the first operation that returns a tensor of it. torch keeps the Python object of a storage
    as long as the storage lives, so a weak reference tells when it ends, even if only C++ held it.

    Who saves a tensor follows from a number: autograd gives each node that it makes the next one, before the operation
    runs and before it saves anything.

    Args:
        model: The model.
        on_cpu: Whether to add what operations on a CPU allocate inside themselves.

    Attributes:
        events: Blocks, with +1 where one begins and -1 where it ends.
        operations: The names of operations, by the number of their node.
    """

    def __init__(self, model: nn.Module, on_cpu: bool) -> None:
        super().__init__()
        if on_cpu:
            try_out()
        self._on_cpu = on_cpu
        self._rows: _Rows | None = None  # of a layer's input
        self._spans: list[tuple[int, int, int]] = []  # rows in 8 bits: first event, the one after the last, bytes
        # Linear layers of stand-ins have a kernel that needs no memory of its own.
        weights = (module._parameters.get("weight") for module in model.modules() if isinstance(module, StandIn))
        self._by_kernel = {w.untyped_storage()._cdata for w in weights if w is not None and not w.requires_grad}
        self.events: list[tuple[Block, int]] = []
        self._live: dict[int, Block] = {}  # by the address of the storage's object
        modules = reversed(list(model.named_modules()))  # of a module's names the first one is kept
        self._known = {id(module): Place(_layer(name), type(module).__name__.lower()) for name, module in modules}
        self._running: list[Place] = []
        self.operations: dict[int, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, and note the storages of its results."""
        if any(issubclass(kind, Tensor) and _is_wrapper(kind) for kind in types):
            return NotImplemented  # it calls operations on the tensors in it
        name = func.overloadpacket._qualified_op_name
        if func is not torch.ops.aten.detach.default:  # which `_pack` calls, before the operation that saves
            self.operations.setdefault(_get_sequence_nr(), name)
        if self._on_cpu and name.startswith("fastln::int8_linear"):
            self._round(name, args[0])
        results = func(*args, **(kwargs or {}))
        for leaf in results if isinstance(results, tuple | list) else (results,):
            for tensor in leaf if isinstance(leaf, list) else (leaf,):
                if isinstance(tensor, Tensor):
                    self._block(tensor, name)
        if self._on_cpu and not self._is_by_kernel(args) and (size := inside(name, args, results)):
            own = Block(size)
            self.events += ((own, +1), (own, -1))
        return results

    def _is_by_kernel(self, args: tuple[Any, ...]) -> bool:
        return any(isinstance(arg, Tensor) and arg.untyped_storage()._cdata in self._by_kernel for arg in args)

    def _round(self, name: str, x: Tensor) -> None:
        """Note the rows in 8 bits that a layer needs of its input, or of its result's gradient."""
        block = self._block(x)
        made_with_it = block.made_by.startswith("fastln::") and x.nbytes == block.size
        begin = block.begin if made_with_it else len(self.events)
        rows = _Rows(block, begin, rows_in_8_bits(x))
        if name.endswith("backward"):
            self._spans.append((begin, len(self.events) + 1, rows.size))  # until the result is there
        elif self._rows is None or self._rows.of is not block:
            self._forget_rows(begin)
            self._rows = rows

    def _forget_rows(self, at: int) -> None:
        if self._rows is not None:
            end = self._rows.of.end
            self._spans.append((self._rows.begin, at if end is None else min(at, end), self._rows.size))
        self._rows = None

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

    def _block(self, tensor: Tensor, made_by: str = "") -> Block:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        block = self._live.get(key)
        before = block
        if block is not None and block.size != size:  # it was resized
            self._end(key, block)
            block = None
        if block is None:
            self._live[key] = block = Block(size)
            if before is not None:
                block.kind, block.saved, block.node = before.kind, before.saved, before.node
            block.watch = weakref.ref(storage, partial(self._end, key, block))
            block.begin, block.made_by = len(self.events), made_by
            self.events.append((block, +1))
        return block

    def _end(self, key: int, block: Block, _: Any = None) -> None:
        if self._live.get(key) is block:
            del self._live[key]
            block.end = len(self.events)
            self.events.append((block, -1))

    def add(self, size: int) -> None:
        """Note memory that begins now and that no operation returns."""
        self.events.append((Block(size), +1))

    def living(self, n_events: int) -> list[Block]:
        """Return the blocks that live after so many events."""
        living = dict[Block, None]()
        for block, sign in self.events[:n_events]:
            if sign > 0:
                living[block] = None
            else:
                del living[block]
        return list(living)

    def changes(self) -> list[tuple[int, int]]:
        """Return for each event by how many bytes what lives changes: blocks, and rows in 8 bits beside them."""
        self._forget_rows(len(self.events))
        rows = [0] * (len(self.events) + 1)
        for begin, end, size in self._spans:
            if begin < end:
                rows[begin] += size
                rows[end] -= size
        return [(block.size * sign, more) for (block, sign), more in zip(self.events, rows, strict=False)]


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


def _layer(module: str) -> str:
    """Return the name of the block that a module is in, up to the first number; else the module's own name."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])

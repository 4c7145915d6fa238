"""Rows in 8 bits that are at hand, because the kernel that made the rows wrote them in 8 bits too.

A layer in 8 bits rounds the rows that it gets: the layer's input, and in the backward its output's gradient. A kernel
that makes such rows rounds them at less cost, while they are in the cache. The bits are the same. So it only matters
that the two find each other, which autograd's graph lets them do:

- *Forward.* A module that makes rows has a `Reader`. A layer in 8 bits that has to round its input looks at the node
  that made it, and notes in the reader of that node how it takes rows. From the next call on they are at hand.
- *Backward.* The node of a layer in 8 bits says how it takes the gradient. An operation whose input was that layer's
  result finds this node as its successor.

Both look through views: attention's heads are views of rows, and the rows that a layer reads are a view of the heads.
Rows are at hand for one tensor object and for the views that have all its numbers in their order in memory, as long as
it lives and nobody writes to it or to a view of it. Everywhere else (no graph, operators for compilers, another kernel)
the layer rounds by itself.
"""

from __future__ import annotations

import threading
import weakref
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_UNREAD = 4
"""After so many calls in a row whose rows nobody took, a module stops rounding them."""

_fuses = True  # tests turn it off

# The nodes of views that have all numbers of a contiguous tensor in its order, and of those that may reorder them.
_RESHAPED = frozenset({"AliasBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0"})
_VIEWED = _RESHAPED | {"PermuteBackward0", "TransposeBackward0"}


class Form(NamedTuple):
    """How a layer in 8 bits takes rows.

    Attributes:
        kernels: The module whose `quantise` rounds them.
        n_cols: The number of their columns.
        turned: Whether they are turned.
        factors: What they are multiplied by first: `(n_cols,)`, or None.
    """

    kernels: ModuleType
    n_cols: int
    turned: bool = False
    factors: Tensor | None = None

    def is_like(self, other: Form) -> bool:
        """Whether rows of this form are rows of the other. Factors must be the same object: memory may be reused."""
        return self[:3] == other[:3] and self.factors is other.factors


class Reader:
    """What is known about who reads the rows that a module makes.

    Attributes:
        form: How a layer in 8 bits takes them; None if there is none, as far as known.
        unread: The calls in a row whose rows nobody took.
    """

    def __init__(self) -> None:
        self.form: Form | None = None
        self.unread = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Reader, ()


class Rounds(NamedTuple):
    """What a kernel writes in 8 bits beside the rows that it makes; nothing by default.

    Attributes:
        told: What the kernel is told about it: one argument, or none.
        rows: The rows in 8 bits.
        form: How they are rounded.
        reader: Who wants to know whether they are taken, if anyone.
    """

    told: tuple[Any, ...] = ()
    rows: Any = None
    form: Form | None = None
    reader: Reader | None = None

    def of(self, x: Tensor) -> Tensor:
        """Return `x`, the rows that the kernel has made, after noting that they are at hand in 8 bits.

        If `x` is a view, the rows are those of its whole memory.
        """
        if self.form is None:
            return x
        if self.reader is None:
            _put(_at_hand.gradients, _owner(x), self.rows, self.form)
        else:
            self.reader.unread += 1
            _at_hand.inputs.clear()
            _put(_at_hand.inputs, _owner(x), self.rows, self.form, self.reader)
        return x


_NOTHING = Rounds()


def for_reader(reader: Reader | None, kernels: ModuleType, like: Tensor) -> Rounds:
    """Return what a kernel writes in 8 bits for the reader of its result.

    Args:
        reader: The reader of the module that the kernel computes, if it has one.
        kernels: The kernel's module.
        like: A tensor shaped like the result, `(..., n_cols)`.
    """
    if reader is None or reader.form is None:
        return _NOTHING
    if reader.unread >= MOST_UNREAD:
        reader.form, reader.unread = None, 0
        return _NOTHING
    return _rounds(reader.form, kernels, like, reader)


def for_successor(ctx: Any, index: int, kernels: ModuleType, like: Tensor, *, laid_out: bool = False) -> Rounds:
    """Return what a kernel writes in 8 bits for the layer that gets the gradient that it computes.

    Args:
        ctx: The context of the operation whose backward this is; None outside of plain eager mode.
        index: The number of the tensor whose gradient it is, among the tensors that the operation was given.
        kernels: The kernel's module.
        like: A tensor shaped like the gradient, `(..., n_cols)`.
        laid_out: Whether it is known that the gradient has the memory layout of the layer's result, so that the
            operation may have got any view of that; else only a view with the same rows.
    """
    if ctx is None:
        return _NOTHING
    node, _ = _behind(ctx.next_functions[index], _VIEWED if laid_out else _RESHAPED)
    form = getattr(node, "takes", None)
    return _NOTHING if form is None else _rounds(form, kernels, like, None)


def rows_of(x: Tensor, dim: int | None = None) -> Tensor:
    """Return a tensor without memory of its own that is shaped like rows with all heads of a token.

    Args:
        x: `(B, H, S, D)`.
        dim: The columns of a head of these rows; D by default.
    """
    n_batches, n_heads, n_tokens, n_cols = x.shape
    return x.new_empty(()).expand(n_batches * n_tokens, n_heads * (n_cols if dim is None else dim))


def has_rows(x: Tensor) -> bool:
    """Whether heads `(B, H, S, D)` are in memory as such rows. Only shapes are known of tensors that are not kept."""
    return x.transpose(1, 2).is_contiguous() or not any(x.stride())


def _behind(edge: tuple[Any, int], views: frozenset[str]) -> tuple[Any, int]:
    """Follow an edge of autograd's graph through views, to the node that made the tensor and its output's number."""
    while type(edge[0]).__name__ in views:
        edge = edge[0].next_functions[0]
    return edge


def _rounds(form: Form, kernels: ModuleType, like: Tensor, reader: Reader | None) -> Rounds:
    rounds_so = getattr(kernels, "ROUNDED_BY", None) is form.kernels and like.shape[-1:] == (form.n_cols,)
    if not _fuses or not rounds_so or not like.numel() or torch.is_inference_mode_enabled():
        return _NOTHING
    rows, rounding = form.kernels.rounding(like, form.factors, turned=form.turned)
    return Rounds((rounding,), rows, form, reader)


def input_rows(x: Tensor, form: Form) -> Any:
    """Return the rows of a layer's input in 8 bits. They stay at hand while `x` lives and no other rows follow."""
    held = _get(_at_hand.inputs, x, form)
    if held is None:
        rows = form.kernels.quantise(x.reshape(-1, x.shape[-1]), turned=form.turned)
        _at_hand.inputs.clear()
        _put(_at_hand.inputs, x, rows, form)
        _teach(x, form)
        return rows
    if held.reader is not None:
        held.reader.unread = 0
    return held.rows


def gradient_rows(dy: Tensor, form: Form) -> Any:
    """Return the rows of the gradient of a layer's output in 8 bits."""
    held = _get(_at_hand.gradients, dy, form)
    if held is None:
        return form.kernels.quantise(dy.reshape(-1, dy.shape[-1]), form.factors)
    del _at_hand.gradients[id(held.of())]
    return held.rows


def forget_rows() -> None:
    """Forget the rows that are at hand in this thread; who wants them rounds them again."""
    _at_hand.inputs.clear()
    _at_hand.gradients.clear()


def bytes_at_hand() -> int:
    """Return the memory of the rows that are at hand in this thread."""
    held = [*_at_hand.inputs.values(), *_at_hand.gradients.values()]
    return sum(part.nbytes for entry in held for part in entry.rows if isinstance(part, Tensor))


def _teach(x: Tensor, form: Form) -> None:
    """Tell the module that made `x` who reads it."""
    if x.is_contiguous():
        node, output_nr = _behind((x.grad_fn, x.output_nr), _VIEWED)
        reader = getattr(getattr(node, "arguments", None), "reader", None)
        if reader is None or output_nr != 0:
            return
        if reader.form is None or reader.form.kernels is not form.kernels:  # those of another dtype or device
            reader.form = form


class _Held(NamedTuple):
    of: weakref.ref[Tensor]
    memory: int
    version: int
    form: Form
    rows: Any
    reader: Reader | None


class _AtHand(threading.local):
    """The rows of this thread that are at hand, by the `id` of their tensor."""

    def __init__(self) -> None:
        self.inputs: dict[int, _Held] = {}  # at most one
        self.gradients: dict[int, _Held] = {}


_at_hand = _AtHand()


def _owner(x: Tensor) -> Tensor:
    """Return the tensor that owns the memory of a view, and counts the writes to it; `x` if it is no view."""
    return x if x._base is None else x._base


def _put(held: dict[int, _Held], x: Tensor, rows: Any, form: Form, reader: Reader | None = None) -> None:
    if x.is_inference():  # nobody would notice that it was written to
        return
    owner = _owner(x)
    of = owner if x.is_contiguous() and owner.is_contiguous() and owner.numel() == x.numel() else x
    key = id(of)
    held[key] = _Held(weakref.ref(of, lambda _: held.pop(key, None)), x.data_ptr(), x._version, form, rows, reader)


def _get(held: dict[int, _Held], x: Tensor, form: Form) -> _Held | None:
    for of in (x, _owner(x)):
        found = held.get(id(of))
        if found is None or found.of() is not of or not found.form.is_like(form):
            continue
        is_whole = of is x or (x.is_contiguous() and x.numel() == of.numel() and x.dtype == of.dtype)
        if is_whole and found.memory == x.data_ptr() and found.version == x._version:
            return found
    return None

"""Late rows: what a model's last block computes token by token, delayed until it is known which tokens are read.

After its last attention, a model treats each token separately, and most tokens' results are never read: a causal
language model reads those before a label, an image classifier reads the first. `LazyRows` passes through the model's
code instead of the hidden states, and a graph records the operations on its rows. When some rows are picked, only those
are computed. Every other use computes all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from fastln import ops
from fastln.errors import FastLNError
from fastln.late.cross_entropy import bind
from fastln.late.graph import Rows, Slice
from fastln.late.layout import has_whole_rows, is_basic, laid_out, row_numbers
from fastln.late.modes import Modes
from fastln.late.tensor import Call, LateTensor, as_it_is_now, asks_for_gradient

WHOLE = 0.9
"""From this share of the rows on, all are computed, because gathering some and scattering their gradients also costs
time."""


class LazyRows(LateTensor):
    """A tensor whose rows (along its last dimension) are a function of the same rows of other tensors.

    Linear layers, norms, activations, dropouts, sums and products of rows stay late. So do views that keep rows whole.
    Picking rows by an index computes only those, and `cross_entropy` computes those with a label. Any other use
    computes all rows, once. A hook or `retain_grad` sees the uses that come after it.

    `LazyRows.of` makes them.
    """

    _rows: Rows
    _twin: Tensor  # on meta; shows where this tensor lies in the memory of all rows
    _modes: Modes
    _own: Tensor | None  # once computed

    @staticmethod
    def of(x: Tensor) -> LazyRows:
        """Return late rows for `x`, which has two dimensions or more."""
        rows = Rows(lambda x: x, (x.reshape(-1, x.shape[-1]),))
        return _lazy(rows, torch.empty(x.shape, dtype=x.dtype, device="meta"), Modes(x.device))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As for every late tensor, except for calls that ask for a gradient."""
        if asks_for_gradient(func, args):
            of: Any = args[:1]
            if func in (torch.autograd.grad, torch.autograd.backward):
                of = (kwargs or {}).get("inputs", args[1:2] if func is torch.autograd.grad else ())
            for x in tree_leaves(of):
                if isinstance(x, LazyRows):
                    x._check_gradient()
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def _later(cls, call: Call) -> Any:
        is_known = call.func in _RULES and any(isinstance(value, LazyRows) for value in call.args)
        return _RULES[call.func](call) if is_known and torch.is_grad_enabled() else None

    def _check_gradient(self) -> None:
        """Raise an error if some rows were used already: a gradient that is asked for now would miss those uses."""
        if self._rows.was_picked():
            raise FastLNError(
                "some of these hidden states were used before their gradient was asked for, so it would not be whole; "
                'ask before anything reads them, or use fastln.prepare(model, ..., without=("late_rows",))'
            )

    def _waits(self) -> bool:
        return self._rows.waits()

    def _may_go_on(self) -> bool:
        """Whether further operations on these rows can stay late."""
        return self._waits() and self._modes.last()

    def _compute(self, writes: bool = False) -> Tensor:
        if self._own is None:
            with self._modes.restored():
                self._own = laid_out(self._rows.memory(writes), self._twin)
        return self._own

    def _source(self) -> tuple[Rows, Modes]:
        return self._rows, self._modes

    def _pick(self, numbers: Tensor) -> Tensor | None:
        """Return rows by their numbers, `(n, d)`; None if there are too many, or others were computed before."""
        if not self._waits() or len(numbers) >= WHOLE * (self._twin.numel() // self._twin.shape[-1]):
            return None
        with self._modes.restored():
            return self._rows.pick(numbers)


def computed(x: Tensor) -> Tensor:
    """Return `x`, with all rows computed if it is late."""
    return x._compute() if isinstance(x, LazyRows) else x


def as_they_are(x: LazyRows) -> LazyRows:
    """Return the same late rows in separate memory, so that later writes do not reach them."""
    return _lazy(Rows(lambda rows: rows, (_node(x),)), torch.empty_like(x._twin), x._modes)


def labelled(x: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the rows of `x` (n_rows, d) that have a label, and their labels; all of both if `x` is not late."""
    if not isinstance(x, LazyRows):
        return x, labels
    index = (labels != ignore_index).nonzero()[:, 0]
    rows = x._pick(row_numbers(x._twin, x.device)[index])
    return (computed(x), labels) if rows is None else (rows, labels[index])


class _Wait(torch.autograd.Function):
    """Makes a `LazyRows`. Its gradient serves uses that only autograd sees, and recomputes the rows.

    All other uses have the history of the computed rows.
    """

    @staticmethod
    def forward(ctx: Any, held: list[Any], twin: Tensor, device: torch.device, *tensors: Tensor) -> Tensor:
        ctx.held, ctx.twin, ctx.n_tensors = held, twin, len(tensors)
        ctx.set_materialize_grads(False)
        return LazyRows._wrapper(twin, device)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * (3 + ctx.n_tensors)
        if torch.is_grad_enabled():
            raise FastLNError("late rows are differentiable once: no backward with create_graph=True")
        if not ctx.held:
            raise FastLNError("an autograd.Function took late hidden states without reading them; pass it `hidden + 0`")
        ((rows, modes),) = ctx.held
        with modes.restored():
            y = laid_out(rows.anew({}).compute(), ctx.twin)
        gradients = torch.autograd.grad(y, tuple(rows.tensors.values()), dy, allow_unused=True)
        return None, None, None, *gradients


def _lazy(rows: Rows, twin: Tensor, modes: Modes) -> LazyRows:
    held: list[Any] = []
    with torch._C.DisableTorchFunctionSubclass():
        lazy: LazyRows = _Wait.apply(held, twin, modes.device, *rows.tensors.values())
    lazy._rows, lazy._twin, lazy._modes, lazy._held, lazy._own = rows, twin, modes, held, None
    return lazy


# Each rule returns the result of a call, late or for the rows that it picks, or None if the call needs all rows.


def _by_rows(call: Call, places: tuple[int, ...] = (0,)) -> Tensor | None:
    """Delay a function of rows; the rows may be at `places` among the arguments."""
    at = {i: x for i, x in enumerate(call.args) if i in places and isinstance(x, Tensor) and x.ndim > 1}
    inputs, call = list(at.values()), call.open_at(*at)
    lazy = next((x for x in inputs if isinstance(x, LazyRows)), None)
    if lazy is None or any(isinstance(value, LazyRows) for value in tree_leaves((call.args, call.kwargs))):
        return None
    if any(x.shape[:-1] != lazy.shape[:-1] or (isinstance(x, LazyRows) and not x._may_go_on()) for x in inputs):
        return None
    args, kwargs = tree_map_only(Tensor, as_it_is_now, (call.args, call.kwargs))
    call = replace(call, args=args, kwargs=kwargs)
    with torch.no_grad():  # a call with no rows gives the dtype and the number of columns
        like = call(*(torch.empty(0, x.shape[-1], dtype=x.dtype, device=x.device) for x in inputs))
    if not isinstance(like, Tensor) or not like.is_floating_point() or like.device != lazy.device:
        return None
    nodes = tuple(_node(x) if isinstance(x, LazyRows) else x.reshape(-1, x.shape[-1]) for x in inputs)
    constants = tuple(value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
    twin = torch.empty(lazy.shape[:-1] + like.shape[1:], dtype=like.dtype, device="meta")
    return _lazy(Rows(call, nodes, constants), twin, lazy._modes)


def _node(x: LazyRows) -> Rows:
    """Return the node of the rows of `x`, in their order."""
    is_all = x._twin.is_contiguous() and (x._twin._base is None or x._twin._base.numel() == x._twin.numel())
    return x._rows if is_all else Slice(x._rows, row_numbers(x._twin, x.device))


def _ours_with_dropout(call: Call) -> Tensor | None:
    """Draw the seed now, as if the rows were not late."""
    p = call.kwargs.get("dropout", 0.0)
    if call.func is ops.dropout:
        p = call.args[1] if len(call.args) > 1 else call.kwargs["p"]
    if p > 0 and call.kwargs.get("seed") is None:
        device = next(x.device for x in call.args if isinstance(x, LazyRows))
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
        call = replace(call, kwargs={**call.kwargs, "seed": seed})
    return _by_rows(call, (0, 1))


def _stock_dropout(call: Call) -> Tensor | None:
    """Delay dropout that drops nothing; otherwise stock code draws the mask now, for all rows."""
    given = {"p": 0.5, "training": True, **dict(zip(("p", "training"), call.args[1:], strict=False)), **call.kwargs}
    return None if given["p"] > 0 and given["training"] else _by_rows(call)


def _addmm(call: Call) -> Tensor | None:
    is_bias = isinstance(call.args[0], Tensor) and call.args[0].ndim == 1
    return _by_rows(call, (1,)) if is_bias else None


def _cast(call: Call) -> Tensor | None:
    if "memory_format" in call.kwargs:
        return None
    empty = torch.empty(0, dtype=call.args[0].dtype, device=call.args[0].device)
    return call.args[0] if call(empty) is empty else _by_rows(call)


def _view(call: Call) -> Tensor | None:
    """Reshape the leading dimensions."""
    lazy = call.args[0]
    if not isinstance(lazy, LazyRows) or not lazy._may_go_on():
        return None
    twin = call(lazy._twin)
    if twin is lazy._twin:
        return lazy
    if twin.dtype != lazy.dtype or twin.ndim < 2 or not has_whole_rows(twin, lazy.shape[-1]):
        return None
    return _lazy(lazy._rows if twin._is_view() else _node(lazy), twin, lazy._modes)


def _index(call: Call) -> Tensor | None:
    """Compute few rows at once; many rows stay late."""
    lazy, index = call.args
    if not isinstance(lazy, LazyRows) or not lazy._waits():
        return None
    if not is_basic(index):
        return _index_by_tensors(lazy, index if isinstance(index, tuple) else (index,))
    twin = call(lazy._twin)
    if twin.shape == lazy.shape:
        return lazy
    if not has_whole_rows(twin, lazy.shape[-1]):
        return None
    rows = lazy._pick(row_numbers(twin, lazy.device))
    if rows is not None:
        return rows.view(twin.shape)
    return _lazy(lazy._rows, twin, lazy._modes) if twin.ndim > 1 and lazy._may_go_on() else None


def _index_by_tensors(lazy: LazyRows, parts: tuple[Any, ...]) -> Tensor | None:
    """Pick rows by masks and numbers of the leading dimensions."""
    kinds = {part.dtype if isinstance(part, Tensor) else type(part) for part in parts}
    n_indexed = sum(part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1 for part in parts)
    if not kinds <= {torch.bool, torch.int64, int, slice} or n_indexed >= lazy.ndim:
        return None
    numbers = row_numbers(lazy._twin, lazy.device).view(lazy.shape[:-1])[parts]
    rows = lazy._pick(numbers.reshape(-1))
    # A copy, as in stock code: writes into it reach nothing else.
    return None if rows is None else rows.view(*numbers.shape, rows.shape[-1]).clone()


def _cross_entropy(call: Call) -> Tensor | None:
    bound = bind(*call.args, **call.kwargs) if isinstance(call.args[0], LazyRows) else None
    if bound is None or bound[2].reduction == "none":
        return None
    rows, labels, cross_entropy = bound
    return cross_entropy(*labelled(rows, labels, cross_entropy.ignore_index))


_by_two_rows = partial(_by_rows, places=(0, 1))

_RULES: dict[Callable[..., Any], Callable[[Call], Tensor | None]] = {
    **dict.fromkeys((F.linear, ops.linear, ops.int8_linear, ops.layer_norm, ops.rms_norm, ops.activation), _by_rows),
    **dict.fromkeys((F.gelu, F.relu, F.silu, torch.relu, torch.tanh, Tensor.tanh), _by_rows),
    **dict.fromkeys((Tensor.add, torch.add, Tensor.sub, Tensor.mul, torch.mul, Tensor.div), _by_two_rows),
    **dict.fromkeys((Tensor.to, Tensor.float), _cast),
    ops.packed_gated_activation: _by_rows,
    ops.gated_activation: _by_two_rows,
    **dict.fromkeys((ops.dropout, ops.dropout_add_norm), _ours_with_dropout),
    F.dropout: _stock_dropout,
    torch.addmm: _addmm,
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten), _view),
    Tensor.contiguous: _view,
    Tensor.__getitem__: _index,
    F.cross_entropy: _cross_entropy,
}

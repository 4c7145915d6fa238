"""Rows that wait: what the last block of a model computes token by token, until it is known which tokens are read.

After the last attention a model treats each token by itself, and of most tokens nobody reads the result: a causal
language model reads those before a label, an image classifier the first. `LazyRows` passes through the model's code as
the tensor that it stands for, noting down what is done to its rows. When some rows are picked, those alone are
computed; every other use computes all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fastln import ops
from fastln.errors import FastLNError
from fastln.late.tensor import LateTensor, Modes

WHOLE = 0.9
"""From this share of the rows on all are computed: to gather some and scatter their gradients costs, too.

Measured on a CPU (the tail of a block, 2,048 x 768 in bfloat16, forward and backward): all 124 ms, three quarters of
them 95, seven eighths 110, all gathered 130.
"""


class LazyRows(LateTensor):
    """A tensor whose rows, those of its last dimension, are a function of the same rows of other tensors.

    Linear layers, norms, activations, dropouts, sums and products of rows stay lazy; so do views that leave rows whole.
    Picking rows by index computes those, as does `cross_entropy` those with a label. Any other use computes all rows,
    once, and works on those from then on, with the values and gradients that they would have had from the start; what
    is written into them is seen by every view. Rows that dropout was drawn for keep their numbers in what is picked or
    computed of the same tensor later. A hook or `retain_grad` is told of the uses that come after it.

    As with `LazyLogits`, calls from Python are seen by `__torch_function__`; what does not pass there meets a tensor
    with a `grad_fn` of its own. Made by `LazyRows.of`.
    """

    _rows: _Rows
    _modes: Modes
    _own: Tensor | None  # what it is, once all of it was computed
    _n_writes: int  # into it or a view of it

    @staticmethod
    def of(x: Tensor) -> LazyRows:
        """Stand for `x`, of two dimensions or more."""
        return _lazy(_Rows(_same, (_leaf(x),)), x.shape, x.dtype, Modes(x.device))

    @classmethod
    def _later(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule = _RULES.get(func)
        return rule(func, args, kwargs) if rule is not None and torch.is_grad_enabled() else None

    def _waits(self) -> bool:
        """Whether there are rows yet to be computed."""
        return self._own is None and self._rows.all is None

    def _compute(self, writes: bool = False) -> Tensor:
        """Return all of it, with its autograd history whatever the modes of now."""
        with self._modes.restored():
            if self._own is None:
                self._own = self._rows.compute().reshape(self.shape)
            if writes:
                # In memory that tensors made of these rows before do not look at, and all views of them do.
                written = self._own if self._n_writes else self._own.clone()
                aliases, n_writes = self._rows.aliases(), self._n_writes + 1
                for alias in aliases:
                    if n_writes == 1:
                        alias._own = written.view(alias.shape)
                    alias._n_writes = n_writes
        return self._own

    def _take(self, index: Tensor) -> Tensor:
        """Return the rows of these numbers, shaped `(*index.shape, d)`, with their autograd history."""
        with self._modes.restored():
            return self._rows.take(index.reshape(-1)).reshape(*index.shape, self.shape[-1])


def computed(x: Tensor) -> Tensor:
    """Return `x`, or all that it stands for."""
    return x._compute() if isinstance(x, LazyRows) else x


def labelled(x: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the rows of `x` (n_rows, d) that have a label, and their labels; all of both where nothing waits."""
    if not isinstance(x, LazyRows):
        return x, labels
    index = (labels != ignore_index).nonzero()[:, 0]
    return (x._take(index), labels[index]) if _are_few(x, index) else (x._compute(), labels)


class _Rows:
    """A function of rows, as a node of a graph: computed for all rows, or for some of them, when somebody asks.

    Attributes:
        function: of its inputs' rows, each `(n, d)`.
        inputs: nodes, or tensors `(n_rows, d)`.
        tensors: what it depends on, with the version that each had.
        all: the result for all rows, once computed.
    """

    def __init__(
        self, function: Callable[..., Tensor], inputs: tuple[_Rows | Tensor, ...], tensors: Iterable[Tensor] = ()
    ) -> None:
        self.function = function
        self.inputs = inputs
        self._aliases: list[weakref.ref[LazyRows]] = []
        self._n_users = 0  # that have not been computed
        self.tensors = {id(t): (t, t._version) for t in tensors}
        for part in inputs:
            if isinstance(part, _Rows):
                self.tensors |= part.tensors
                part._n_users += 1
            else:
                self.tensors[id(part)] = part, part._version
        self.all: Tensor | None = None
        self._version = 0  # of that
        self._some: tuple[Tensor, Tensor] | None = None  # which rows were taken, and what they are

    def compute(self) -> Tensor:
        """Return `(n_rows, d)`."""
        if self.all is None:
            self.check_unwritten()
            result = self.function(*(part.compute() if isinstance(part, _Rows) else part for part in self.inputs))
            self.all = result if self._some is None else result.index_copy(0, *self._some)
            self._version = self.all._version
            for part in self.inputs:
                if isinstance(part, _Rows):
                    part._n_users -= 1
                    if not part._n_users and not part.aliases():
                        part.all = None  # nobody will ask for it again
        elif self.all._version != self._version:
            raise FastLNError(
                "hidden states of the last block were written to through a view, before others were computed of them; "
                "write into a clone"
            )
        return self.all

    def aliases(self) -> list[LazyRows]:
        """Return the tensors that stand for these rows, in one shape or another."""
        return [alias for reference in self._aliases if (alias := reference()) is not None]

    def again(self, done: dict[int, Tensor]) -> Tensor:
        """Return `(n_rows, d)`, computed of the tensors anew, with a history of its own."""
        if id(self) not in done:
            parts = (part.again(done) if isinstance(part, _Rows) else part for part in self.inputs)
            done[id(self)] = self.function(*parts)
        return done[id(self)]

    def take(self, index: Tensor) -> Tensor:
        """Return the rows of these numbers, `(n, d)`."""
        if self._some is not None and (self._some[0] is index or torch.equal(self._some[0], index)):
            return self._some[1]
        if self.all is not None or self._some is not None:  # rows are computed once, for what dropout drew to stay
            return self.compute().index_select(0, index)
        self.check_unwritten()
        parts = (part.take(index) if isinstance(part, _Rows) else part.index_select(0, index) for part in self.inputs)
        self._some = index, self.function(*parts)
        return self._some[1]

    def check_unwritten(self) -> None:
        """Raise where a tensor that the rows are made of has been written to."""
        if any(tensor._version != version for tensor, version in self.tensors.values()):
            raise FastLNError(
                "these hidden states were left uncomputed, and what they are made of (activations, weights) has been "
                "written to since; look at them before the optimizer's step"
            )


class _Picked(_Rows):
    """Most of another's rows, by their numbers: which of them are read is not known yet."""

    def __init__(self, rows: _Rows, numbers: Tensor) -> None:
        super().__init__(lambda x: x.index_select(0, numbers), (rows,))
        self._rows, self._numbers = rows, numbers

    def take(self, index: Tensor) -> Tensor:
        """Return the rows of these numbers among those picked, `(n, d)`."""
        return self._rows.take(self._numbers.index_select(0, index))


class _Wrap(torch.autograd.Function):
    """Makes a `LazyRows`, whose gradient is found by computing the rows again.

    For uses that autograd alone sees; all others have the history of the rows that they got.
    """

    @staticmethod
    def forward(ctx: Any, rows: _Rows, shape: torch.Size, dtype: torch.dtype, modes: Modes, *tensors: Tensor) -> Tensor:
        ctx.rows, ctx.modes, ctx.tensors = rows, modes, tensors  # which the rows hold anyway
        ctx.set_materialize_grads(False)
        return Tensor._make_wrapper_subclass(LazyRows, shape, dtype=dtype, device=modes.device)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * (4 + len(ctx.tensors))
        if torch.is_grad_enabled():
            raise FastLNError("rows that waited are differentiable once: no backward with create_graph=True")
        ctx.rows.check_unwritten()
        with ctx.modes.restored():
            y = ctx.rows.again({}).reshape(dy.shape)
        gradients = torch.autograd.grad(y, ctx.tensors, dy, allow_unused=True)
        return None, None, None, None, *gradients


def _lazy(rows: _Rows, shape: torch.Size, dtype: torch.dtype, modes: Modes) -> LazyRows:
    tensors = [tensor for tensor, _ in rows.tensors.values() if tensor.requires_grad]
    with torch._C.DisableTorchFunctionSubclass():
        lazy: LazyRows = _Wrap.apply(rows, shape, dtype, modes, *tensors)
    lazy._rows, lazy._own, lazy._modes, lazy._n_writes = rows, None, modes, 0
    rows._aliases.append(weakref.ref(lazy))
    return lazy


def _same(x: Tensor) -> Tensor:
    return x


def _leaf(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _may_go_on(x: LazyRows) -> bool:
    """Whether more of it can be left for later."""
    return x._waits() and x._modes.last()


def _are_few(x: LazyRows, index: Tensor) -> bool:
    return x._waits() and index.numel() < WHOLE * (x.numel() // max(x.shape[-1], 1))


# Each rule returns what a call of `func` is, done lazily or on the rows that it picks, or None where it has to be done
# on all of them.


def _by_rows(*places: int) -> Callable[..., Tensor | None]:
    """A function of rows, which may come at these places among the arguments."""

    def rule(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        others = [value for i, value in enumerate(args) if i not in places]
        if any(isinstance(value, LazyRows) for value in tree_leaves((others, kwargs))):
            return None
        leading, modes = next((value.shape[:-1], value._modes) for value in args if isinstance(value, LazyRows))
        inputs: dict[int, Tensor] = {}
        constants = [value for value in tree_leaves((others, kwargs)) if isinstance(value, Tensor)]
        for i in places[: len(args)]:
            value = args[i]
            if isinstance(value, LazyRows) or (isinstance(value, Tensor) and value.ndim > 1):
                if value.shape[:-1] != leading or (isinstance(value, LazyRows) and not _may_go_on(value)):
                    return None  # broadcast to these, perhaps, and other rows then
                inputs[i] = value
            elif isinstance(value, Tensor):
                constants.append(value)

        at, others = tuple(inputs), [None if i in inputs else value for i, value in enumerate(args)]

        def function(*rows: Tensor) -> Tensor:
            merged = list(others)
            for i, value in zip(at, rows, strict=True):
                merged[i] = value
            return func(*merged, **kwargs)

        with torch.no_grad():  # of no rows: what dtype and how many columns the result has
            empty = (torch.empty(0, x.shape[-1], dtype=x.dtype, device=x.device) for x in inputs.values())
            probe = function(*empty)
        elsewhere = isinstance(probe, Tensor) and any(probe.device != x.device for x in inputs.values())
        if not isinstance(probe, Tensor) or not probe.is_floating_point() or elsewhere:
            return None
        if func in _CASTS and all(isinstance(x, LazyRows) and x.dtype == probe.dtype for x in inputs.values()):
            return args[0]
        parts = tuple(x._rows if isinstance(x, LazyRows) else _leaf(x) for x in inputs.values())
        return _lazy(_Rows(function, parts, constants), leading + probe.shape[1:], probe.dtype, modes)

    return rule


def _dropping(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A function of rows that may drop elements: the seed is drawn now, as it would be if nothing waited."""
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.0) if func is ops.dropout else kwargs.get("dropout", 0.0)
    if p > 0 and kwargs.get("seed") is None:
        device = next(value.device for value in args if isinstance(value, LazyRows))
        kwargs = {**kwargs, "seed": torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)}
    return _by_rows(0, 1)(func, args, kwargs)


def _dropping_nothing(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    def drops(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> bool:
        return p > 0 and training

    return None if drops(*args, **kwargs) else _by_rows(0)(func, args, kwargs)


def _addmm(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    is_bias = isinstance(args[0], Tensor) and args[0].ndim == 1
    return _by_rows(1)(func, args, kwargs) if is_bias else None


def _same_rows(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Shape the leading dimensions anew."""
    if not args or not isinstance(args[0], LazyRows) or not _may_go_on(args[0]):
        return None
    lazy, *others = args
    twin = func(torch.empty(lazy.shape, dtype=lazy.dtype, device="meta"), *others, **kwargs)
    same = twin.ndim > 1 and twin.shape[-1] == lazy.shape[-1] > 1 and twin.numel() == lazy.numel()
    if not same or twin.dtype != lazy.dtype or not twin.is_contiguous():
        return None
    return lazy if twin.shape == lazy.shape else _lazy(lazy._rows, twin.shape, lazy.dtype, lazy._modes)


def _pick(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    lazy, index = args
    if not isinstance(lazy, LazyRows) or not lazy._waits():
        return None
    parts = _leading_index(index if isinstance(index, tuple) else (index,), lazy.ndim)
    if parts is None:
        return None
    leading = lazy.shape[:-1]
    numbers = torch.arange(leading.numel(), device=lazy.device).view(leading)[parts]
    if _are_few(lazy, numbers):
        return lazy._take(numbers)
    if not numbers.ndim or not _may_go_on(lazy) or not all(isinstance(part, slice) for part in parts):
        return None
    if numbers.shape == leading:
        return lazy
    rows = _Picked(lazy._rows, numbers.reshape(-1))
    return _lazy(rows, numbers.shape + lazy.shape[-1:], lazy.dtype, lazy._modes)


def _leading_index(parts: tuple[Any, ...], ndim: int) -> tuple[Any, ...] | None:
    """Return the parts of an index into the dimensions but the last; None where it is into that, or of other kinds."""
    if any(type(part) not in (int, slice, Tensor, type(...)) for part in parts):
        return None
    n_taken = sum(part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1 for part in parts)
    dots = [i for i, part in enumerate(parts) if part is ...]
    if len(dots) == 1:
        parts = (*parts[: dots[0]], *(slice(None),) * (ndim - n_taken + 1), *parts[dots[0] + 1 :])
        n_taken = ndim
    if n_taken == ndim and isinstance(parts[-1], slice) and parts[-1] == slice(None):
        return parts[:-1]
    return parts if n_taken < ndim and not dots else None


def _cross_entropy(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    def bind(
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor | None:
        classes = input.ndim == 2 and target.ndim == 1 and target.dtype == torch.int64
        if not classes or size_average is not None or reduce is not None or reduction == "none":
            return None
        input, target = labelled(input, target, ignore_index)
        settings = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
        return func(input, target, weight, **settings)

    return bind(*args, **kwargs)


_RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    **dict.fromkeys((F.linear, ops.linear, ops.layer_norm, ops.rms_norm, ops.activation), _by_rows(0)),
    **dict.fromkeys((F.gelu, F.relu, F.silu, torch.relu, torch.tanh, Tensor.tanh), _by_rows(0)),
    F.dropout: _dropping_nothing,
    **dict.fromkeys((Tensor.to, Tensor.float, ops.packed_gated_activation), _by_rows(0)),
    torch.addmm: _addmm,
    **dict.fromkeys((ops.dropout, ops.dropout_add_norm), _dropping),
    ops.gated_activation: _by_rows(0, 1),
    **dict.fromkeys((Tensor.add, torch.add, Tensor.sub, Tensor.mul, torch.mul, Tensor.div), _by_rows(0, 1)),
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten), _same_rows),
    Tensor.contiguous: _same_rows,
    Tensor.__getitem__: _pick,
    F.cross_entropy: _cross_entropy,
}

_CASTS = (Tensor.to, Tensor.float)

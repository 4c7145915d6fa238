"""The graph of late rows: functions of rows, computed on request for some rows or for all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastln.errors import FastLNError
from fastln.late.tensor import Unwritten


class Rows:
    """Rows as a function of the same rows of other nodes or tensors. The values that a node stands for never change.

    A node keeps two results: the rows that were picked first, and all rows. So later reads get the same values as the
    first, with the same elements dropped.

    Attributes:
        function: Makes these rows from the inputs' rows, each `(n, d)`; no other node has the same object.
        inputs: Nodes, or tensors `(n_rows, d)`.
        tensors: The tensors that the rows depend on and that need a gradient, by `id`.
    """

    def __init__(
        self, function: Callable[..., Tensor], inputs: tuple[Rows | Tensor, ...], constants: tuple[Tensor, ...] = ()
    ) -> None:
        self.function, self.inputs = function, inputs
        own = [*(x for x in inputs if isinstance(x, Tensor)), *constants]
        self.tensors = {id(tensor): tensor for tensor in own if tensor.requires_grad}
        for x in inputs:
            self.tensors |= x.tensors if isinstance(x, Rows) else {}
        self._unwritten = Unwritten(own)
        self._untouched = True
        self._index: Tensor | None = None  # of the rows that were picked first, before any others were computed
        self._picked: _Result | None = None
        self._all: _Result | None = None
        self._memory: Tensor | None = None

    def waits(self) -> bool:
        """Whether some rows have not been computed yet."""
        return self._all is None

    def was_picked(self) -> bool:
        """Whether only some rows have been computed, and used."""
        return self._picked is not None and self._all is None

    def pick(self, index: Tensor) -> Tensor | None:
        """Compute only the rows with these numbers, `(n, d)`; None if other rows were computed before."""
        if self._untouched:
            self._untouched, self._index = False, index
        if self._index is None or not (self._index is index or torch.equal(self._index, index)):
            return None
        if self._picked is None:
            self._unwritten.check()
            self._picked = _Result(self._some(index))
        return self._picked.get()

    def _some(self, index: Tensor) -> Tensor:
        rows = (x._take(index) if isinstance(x, Rows) else x.index_select(0, index) for x in self.inputs)
        return self.function(*rows)

    def _take(self, index: Tensor) -> Tensor:
        rows = self.pick(index)
        return self.compute().index_select(0, index) if rows is None else rows

    def compute(self) -> Tensor:
        """Return all rows, `(n_rows, d)`, contiguous."""
        if self._all is None:
            self._untouched = False
            self._unwritten.check()
            rows = self.function(*(x.compute() if isinstance(x, Rows) else x for x in self.inputs))
            if self._index is not None:
                rows = rows.index_copy(0, self._index, self._take(self._index))
            self._all = _Result(rows.contiguous())
            # This frees the results that the inputs keep, unless something else holds the inputs.
            self.inputs = tuple(x._forgetful() if isinstance(x, Rows) else x for x in self.inputs)
        return self._all.get()

    def memory(self, writes: bool) -> Tensor:
        """Return all rows, in the one memory that all tensors for them share, so that each sees the others' writes."""
        if self._memory is None:
            rows = self.compute()
            # Other rows may still be computed from these, so a caller that writes gets a copy.
            self._memory = rows.clone() if writes else rows
        return self._memory

    def anew(self, done: dict[Callable[..., Tensor], Rows]) -> Rows:
        """Return a copy of the graph with nothing computed, for a second computation with its own autograd history."""
        if self.function not in done:
            node = done[self.function] = self._forgetful()
            node.inputs = tuple(x.anew(done) if isinstance(x, Rows) else x for x in self.inputs)
        return done[self.function]

    def _forgetful(self) -> Rows:
        node = copy.copy(self)
        node._picked = node._all = node._memory = None
        node._untouched = False
        return node


class Slice(Rows):
    """Some rows of another node, by their numbers `(n,)`; it is not known yet which of them are read."""

    def __init__(self, rows: Rows, numbers: Tensor) -> None:
        super().__init__(partial(torch.index_select, dim=0, index=numbers), (rows,))
        self._numbers = numbers

    def _some(self, index: Tensor) -> Tensor:
        (rows,) = self.inputs
        assert isinstance(rows, Rows)
        return rows._take(self._numbers.index_select(0, index))


class _Result:
    """A computed tensor, which callers may hold."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._version = tensor, tensor._version

    def get(self) -> Tensor:
        """Return the tensor; raise if it was written to."""
        if self._tensor._version != self._version:
            raise FastLNError(
                "hidden states of the last block were written to through a view before others were computed from "
                "them; write into a clone"
            )
        return self._tensor

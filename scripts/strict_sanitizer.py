"""triton-viz's sanitizer, made to run fastln's kernels and to miss less.

triton-viz runs a kernel on symbols in place of numbers: program ids, elements of `tl.arange` and loop counters become
integers of the solver Z3, which is asked for values that take a load or store, where its mask lets it, out of bounds.
Nothing is loaded, and numbers read from memory stay unknown; so what is found holds for every content of the tensors.

What version 3.0 cannot do, or does too loosely, is put right here:

- an access must lie in the tensor that its own pointer belongs to, not in any that the kernel was given;
- each call of `tl.arange` is a variable of its own; two of the same length were one, which left all but the diagonal
  of a square tile unchecked. (So a mask must be made from the same call as the address that it guards.)
- each launch is checked, also after one with the same arguments; a question that Z3 cannot answer is an error;
- a tensor that begins inside its storage has its rows where they are, not that far beyond;
- `tl.static_range` counts in numbers, for the kernels index tuples by it; a program id with one possible value is that;
- `tl.sum` keeps its shape; `tl.split` and `tl.math.umulhi` give unknown numbers.

Integers have no width: an offset that overflows int32 goes unnoticed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
import z3  # type: ignore[import-not-found]
from triton.runtime.interpreter import interpreter_builder
from triton_viz.clients.sanitizer import sanitizer  # type: ignore[import-not-found]
from triton_viz.clients.sanitizer.sanitizer import (  # type: ignore[import-not-found]
    SymbolicExpr,
    SymbolicSanitizer,
)
from triton_viz.clients.utils import get_physical_addr_from_tensor_slice  # type: ignore[import-not-found]
from triton_viz.core.callbacks import ForLoopCallbacks, OpCallbacks  # type: ignore[import-not-found]
from triton_viz.core.data import MakeRange, ProgramId, ReduceSum  # type: ignore[import-not-found]
from triton_viz.core.patch import OPERATION_REGISTRY  # type: ignore[import-not-found]

# triton-viz refuses every operation of tl.math that it patches; unpatched, they reach the builder's, which it supports.
OPERATION_REGISTRY["triton"].namespaces[tl.math].clear()
# A joined tensor is one that triton-viz never evaluates, so an address made from it would be an error, not a pass.
interpreter_builder.create_split = lambda joined: (SymbolicExpr.create("join", joined, joined),) * 2


def _physical_rows(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """The first and last address of each row; triton-viz adds the storage's offset to a pointer that has it already."""
    offset = tensor.storage_offset() * tensor.element_size()
    return [(first - offset, last - offset) for first, last in get_physical_addr_from_tensor_slice(tensor)]


sanitizer.get_physical_addr_from_tensor_slice = _physical_rows


class _Solver(z3.Solver):
    """A solver whose "unknown" is no silent pass."""

    def check(self, *assumptions: Any) -> Any:
        answer = super().check(*assumptions)
        if answer == z3.unknown:
            raise RuntimeError(f"Z3 cannot decide whether an access is in bounds: {self.reason_unknown()}")
        return answer


class StrictSanitizer(SymbolicSanitizer):
    """Checks the launches of one kernel.

    Attributes:
        records: The accesses found out of bounds.
        launches: How many launches were checked.
        accesses: How many loads and stores were checked, each for all programs and elements at once.
    """

    def __init__(self) -> None:
        super().__init__(abort_on_error=False)
        self.launches = 0
        self.accesses = 0

    def grid_callback(self, grid: tuple[int, ...]) -> None:
        """Begin a launch, whose arguments are known by now."""
        super().grid_callback(grid)
        self.launches += 1
        self.cache_grid = None
        self.solver = _Solver()
        self.solver.add(self.pid_ok)

    def _check_range_satisfiable(self, access_addr: Any, expr_constraints: Any, symbolic_expr: Any, *rest: Any) -> None:
        self.accesses += 1
        base = self._collect_tensor_base(symbolic_expr)
        own = [
            z3.And(self.addr_sym >= first, self.addr_sym <= last)
            for first, last, tensor in self.tensor_addrs
            if tensor.data_ptr() == base
        ]
        self.solver.push()
        self.solver.add(z3.Not(z3.Or(own)))
        super()._check_range_satisfiable(access_addr, expr_constraints, symbolic_expr, *rest)
        self.solver.pop()

    def register_op_callback(self, op_type: type) -> OpCallbacks:
        """Return what to call in place of and after an operation of the interpreter's."""
        callbacks = super().register_op_callback(op_type)
        symbolic = callbacks.op_overrider

        def program_id(axis: int) -> SymbolicExpr:
            return SymbolicExpr.create("const", 0, tl.int32) if self.grid[axis] == 1 else symbolic(axis)

        def make_range(ret_ty: Any, start: int, end: int) -> SymbolicExpr:
            expression = symbolic(ret_ty, start, end)
            expression.z3 = z3.FreshInt("arange")
            expression.constraints = z3.And(expression.z3 >= start, expression.z3 < end)
            return expression

        def keep_shape(total: tl.tensor, x: tl.tensor, axis: int | None = None, keep_dims: bool = False) -> None:
            assert not keep_dims
            if axis is not None:
                shape = [n for dim, n in enumerate(x.type.shape) if dim != axis]
                total.type = tl.block_type(total.dtype, shape)
                total.shape = tl.tuple([tl.constexpr(n) for n in shape])

        if op_type is ProgramId:
            callbacks.op_overrider = program_id
        elif op_type is MakeRange:
            callbacks.op_overrider = make_range
        elif op_type is ReduceSum:
            callbacks.after_callback = keep_shape
        return callbacks

    def register_for_loop_callback(self) -> ForLoopCallbacks:
        """Return what to call in loops."""
        symbolic = super().register_for_loop_callback()
        static: list[bool] = []  # of the loops that are running

        def wrap(iterable: Any, line: int, kind: str, *call: Any) -> Any:
            return None if kind == "tl_static_range" else symbolic.range_wrapper_factory(iterable, line, kind, *call)

        return ForLoopCallbacks(
            range_type_callback=lambda line, kind: static.append(kind == "tl_static_range"),
            range_wrapper_factory=wrap,
            before_loop_callback=symbolic.before_loop_callback,
            loop_iter_overrider=lambda line, i: i if static[-1] else symbolic.loop_iter_overrider(line, i),
            after_loop_callback=lambda line: None if static.pop() else symbolic.after_loop_callback(line),
        )

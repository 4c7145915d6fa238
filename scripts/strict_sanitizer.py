"""A version of triton-viz's sanitizer that runs fastln's kernels and misses fewer errors.

triton-viz runs a kernel on symbols instead of numbers. Program ids, elements of `tl.arange` and loop counters become
integers of the solver Z3. Z3 then searches for values that take a load or store out of bounds although its mask allows
it. Nothing is loaded, and numbers read from memory stay unknown. So the findings hold for any content of the tensors.

This module fixes what triton-viz 3.0 cannot do or does too loosely:

- An access must be inside the tensor of its own pointer, not inside just any of the kernel's tensors.
- Each call of `tl.arange` is a separate variable. In triton-viz two calls of the same length are one variable, which
  leaves all but the diagonal of a square tile unchecked. (So a mask must use the same call as the address it guards.)
- Each launch is checked, even after one with the same arguments. If Z3 cannot answer, that is an error.
- The rows of a tensor that begins inside its storage get their real addresses, without adding the offset twice.
- `tl.static_range` yields numbers, because the kernels use it to index tuples. A program id with only one possible
  value is that number.
- `tl.sum` keeps its shape. `tl.split` and `tl.math.umulhi` return unknown numbers.

Integers have no width, so it does not detect offsets that overflow int32.
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

# triton-viz rejects every operation of tl.math that it patches. Without the patches, they reach builder operations that
# it supports.
OPERATION_REGISTRY["triton"].namespaces[tl.math].clear()
# triton-viz never evaluates a joined tensor, so an address computed from one would be an error and not pass silently.
interpreter_builder.create_split = lambda joined: (SymbolicExpr.create("join", joined, joined),) * 2


def _physical_rows(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Return the first and last address of each row. triton-viz adds the storage offset a second time; undo that."""
    offset = tensor.storage_offset() * tensor.element_size()
    return [(first - offset, last - offset) for first, last in get_physical_addr_from_tensor_slice(tensor)]


sanitizer.get_physical_addr_from_tensor_slice = _physical_rows


class _Solver(z3.Solver):
    """A solver that raises an error instead of returning "unknown"."""

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
        """Start a launch. Its arguments are known at this point."""
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
        """Return the functions to call instead of, and after, an operation of the interpreter."""
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
            if axis is not None:
                kept = [1] if keep_dims else []
                shape = [*x.type.shape[:axis], *kept, *x.type.shape[axis + 1 :]]
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
        """Return the functions to call in loops."""
        symbolic = super().register_for_loop_callback()
        static: list[bool] = []  # whether each running loop is a static_range

        def wrap(iterable: Any, line: int, kind: str, *call: Any) -> Any:
            return None if kind == "tl_static_range" else symbolic.range_wrapper_factory(iterable, line, kind, *call)

        return ForLoopCallbacks(
            range_type_callback=lambda line, kind: static.append(kind == "tl_static_range"),
            range_wrapper_factory=wrap,
            before_loop_callback=symbolic.before_loop_callback,
            loop_iter_overrider=lambda line, i: i if static[-1] else symbolic.loop_iter_overrider(line, i),
            after_loop_callback=lambda line: None if static.pop() else symbolic.after_loop_callback(line),
        )

"""Time a transformer's MLP on a GPU, forward and backward: in 8 bits by fastln, beside torch in 16 bits.

A trained LayerNorm, a frozen layer, GELU and a frozen layer. "fastln" is what prepared models run: the norm and the
activation, forward and backward, round the rows that they make for the layers. In "fastln, rounded apart" every layer
rounds its rows by a pass of its own. The difference is what rounding where rows are made brings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from gpu_linears import BF16, Run, measure_beside_torch
from gpu_timing import Bench, copies_for
from norm_cases import DTYPES, LAYER_NORM, Results
from norm_checks import SEED
from report_rows import Row, source_digest
from torch import Tensor

from fastln import ops
from fastln.ops import rounded
from fastln_kernels import int8

SHAPES = ((1576, 768, 3072), (8192, 4096, 11008))
"""Rows, columns and hidden columns: ViT-B/16 on 8 pictures, and a 7B model on 8,192 tokens."""

LARGEST_ERROR = 0.05
"""The largest relative error of y and dx, which two products in 8 bits each make, against float32; 0.02 is usual."""

TRITON = ops.OpSettings("triton")


@dataclass(frozen=True)
class Mlp:
    """An MLP with its rows.

    Attributes:
        x, dy: `(n_rows, n_cols)`; `x` wants its gradient.
        scale, shift: `(n_cols,)`, the norm's, which train.
        up, down: `(n_hidden, n_cols)` and `(n_cols, n_hidden)`.
    """

    x: Tensor
    dy: Tensor
    scale: Tensor
    shift: Tensor
    up: Tensor
    down: Tensor

    def results(self, y: Tensor) -> Results:
        """Return `y`, and the gradients, which this computes."""
        gradients = torch.autograd.grad(y, (self.x, self.scale, self.shift), self.dy)
        return {"y": y.detach(), **dict(zip(("dx", "dweight", "dbias"), gradients, strict=True))}


def make_mlp(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seed: int) -> Mlp:
    """Return an MLP of normally distributed numbers."""
    n_rows, n_cols, n_hidden = shape
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, device=device, generator=generator) * scale).to(dtype)

    up, down = draw(n_hidden, n_cols, scale=n_cols**-0.5), draw(n_cols, n_hidden, scale=n_hidden**-0.5)
    trained = (draw(n_rows, n_cols), draw(n_cols), draw(n_cols))
    x, scale, shift = (t.requires_grad_() for t in trained)
    return Mlp(x, draw(n_rows, n_cols), scale, shift, up, down)


def exact(mlp: Mlp) -> Results:
    """Compute by torch, in the dtype of the rows."""
    normed = F.layer_norm(mlp.x, mlp.scale.shape, mlp.scale, mlp.shift, LAYER_NORM.eps)
    return mlp.results(F.linear(F.gelu(F.linear(normed, mlp.up)), mlp.down))


def in_8_bits(mlp: Mlp, *, fuses: bool) -> Run:
    """Return what computes in 8 bits, with weights as in an encoder: one that reads a norm is turned.

    Args:
        mlp: The MLP.
        fuses: Whether kernels round the rows that they make, from the second call on.
    """
    up, down = int8.quantise_weight(mlp.up, turned=True), int8.quantise_weight(mlp.down)
    of_norm, of_activation = rounded.Reader(), rounded.Reader()

    def run() -> Results:
        with mock.patch.object(rounded, "_fuses", fuses):
            normed = ops.dropout_add_norm(
                *(mlp.x, None, mlp.scale, mlp.shift, LAYER_NORM), settings=TRITON, reader=of_norm
            )
            assert isinstance(normed, Tensor)
            hidden = ops.int8_linear(normed, up, settings=TRITON)
            active = ops.activation(hidden, "gelu", settings=TRITON, reader=of_activation)
            return mlp.results(ops.int8_linear(active, down, settings=TRITON))

    return run


MAKERS: dict[str, Callable[[Mlp], Run]] = {
    BF16: lambda mlp: lambda: exact(mlp),
    "fastln": lambda mlp: in_8_bits(mlp, fuses=True),
    "fastln, rounded apart": lambda mlp: in_8_bits(mlp, fuses=False),
}
"""What is timed, by library."""


def measure_mlp(shape: tuple[int, int, int], dtype: str, bench: Bench) -> Iterable[Row]:
    """Check and time a forward and backward of an MLP. Returns a row for each library."""
    n_rows, n_cols, n_hidden = shape
    n_bytes = (2 * n_rows * n_cols + 2 * n_cols * n_hidden) * DTYPES[dtype].itemsize
    n_copies = copies_for(n_bytes, bench.l2_bytes)
    mlps = [make_mlp(shape, DTYPES[dtype], bench.device, SEED + i) for i in range(n_copies)]
    first = mlps[0]
    wide = Mlp(*(t.detach().float().requires_grad_(t.requires_grad) for t in vars(first).values()))
    want = exact(wide)

    def new_row(name: str) -> Row:
        case = f"mlp ({n_cols} to {n_hidden} and back)"
        return Row(bench.machine, dtype, dtype, n_cols, n_rows, case, name, source_digest(), n_bytes, measured={})

    def errors_of(results: Results) -> dict[str, float]:
        return {name: float((got.float() - want[name]).norm() / want[name].norm()) for name, got in results.items()}

    def runs(make: Callable[[Mlp], Run]) -> Callable[[], list[Run]]:
        return lambda: [make(mlp) for mlp in mlps]

    makers = {name: runs(make) for name, make in MAKERS.items()}
    operations = 4 * 2 * n_rows * n_cols * n_hidden
    return measure_beside_torch(new_row, makers, errors_of, LARGEST_ERROR, operations, bench)

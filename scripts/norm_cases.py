"""The operations that both reports are about, one table for the two, and how fastln's kernels are asked for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastln_kernels.reference import NormBackward, NormForward, NormKind

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = (384, 768, 1024, 1152, 1280, 2048, 4096, 8192, 16384, 32768, 65536)
DROPOUT = 0.125  # in steps of 1/65536 like fastln's, so that everybody scales by the same number

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A norm, asked for some of its results.

    Attributes:
        name: As on the command line and in the rows.
        kind: Which norm.
        results: What it has to return: `y` (and `stream`), or gradients.
        weight: Whether it has a weight.
        bias: Whether it has a bias.
        residual: Whether it is of the sum `residual + dropout(x)`.
        dropout: Of `x`, before the sum.
        keeps_normed: Whether the sum itself is not returned (post-norm); fastln then keeps x_hat for the backward.
    """

    name: str
    kind: NormKind
    results: tuple[str, ...]
    weight: bool = True
    bias: bool = True
    residual: bool = False
    dropout: float = 0.0
    keeps_normed: bool = False

    @property
    def backward(self) -> bool:
        """Whether gradients are asked for."""
        return "y" not in self.results

    @property
    def returns_stream(self) -> bool:
        """Whether the forward returns the sum, so that a gradient reaches it by other ways too."""
        return self.residual and not self.keeps_normed

    @property
    def needs_rows(self) -> bool:
        """Whether gradients of rows are asked for."""
        return bool({"dx", "dresidual"} & set(self.results))

    @property
    def needs_saved(self) -> bool:
        """Whether the gradients asked for depend on what was normalised."""
        return self.results != ("dbias",)

    @property
    def tensors(self) -> int:
        """How many tensors of rows must be read or written, whoever does it.

        A forward reads x (and the residual) and writes y (and the sum, or what stands for it in the backward). A
        backward reads dy, what was normalised and the gradient of the returned sum, each where it is needed, and writes
        dx and dresidual, which are one tensor where nothing was dropped.
        """
        if not self.backward:
            return 2 * (1 + self.residual)
        read = 1 + self.needs_saved + (self.returns_stream and self.needs_rows)
        return read + self.needs_rows * (1 + (self.dropout > 0 and {"dx", "dresidual"} <= set(self.results)))


def _cases(norm: str, kind: NormKind, wanted: Sequence[str], **options: Any) -> Iterator[Case]:
    for what in wanted:
        results = tuple(what.split())
        if what == "forward":
            results = ("y", "stream") if Case("", kind, (), **options).returns_stream else ("y",)
        elif what == "backward":
            results = ("dx", "dresidual", "dweight", "dbias")
        yield Case(f"{norm}-{'-'.join(what.split())}", kind, results, **options)


LAYER_NORM = NormKind(1e-5)
RMS_NORM = NormKind(1e-6, centre=False)
LLAMA_RMS_NORM = NormKind(1e-6, centre=False, round_normed=True)
GEMMA_RMS_NORM = NormKind(1e-6, centre=False, offset=1.0)
SUBSETS = ("dx", "dweight", "dbias", "dx dweight", "dx dbias", "dweight dbias", "dx dweight dbias")

CASES = {
    case.name: case
    for case in (
        *_cases("layer_norm", LAYER_NORM, ("forward", *SUBSETS)),
        *_cases("layer_norm_no_bias", LAYER_NORM, ("forward", "dx dweight"), bias=False),
        *_cases("layer_norm_no_affine", LAYER_NORM, ("forward", "dx"), weight=False, bias=False),
        *_cases("rms_norm", RMS_NORM, ("forward", "dx", "dweight", "dx dweight"), bias=False),
        *_cases("llama_rms_norm", LLAMA_RMS_NORM, ("forward", "dweight", "dx dweight"), bias=False),
        *_cases("gemma_rms_norm", GEMMA_RMS_NORM, ("forward", "dx dweight"), bias=False),
        *_cases("add_layer_norm", LAYER_NORM, ("forward", "backward"), residual=True),
        *_cases("dropout_add_layer_norm", LAYER_NORM, ("forward", "backward"), residual=True, dropout=DROPOUT),
        *_cases(
            *("dropout_add_layer_norm_post", LAYER_NORM, ("forward", "backward")),
            residual=True,
            dropout=DROPOUT,
            keeps_normed=True,
        ),
    )
}


@dataclass(frozen=True)
class Inputs:
    """What a case takes; None for what it has not."""

    x: Tensor
    dy: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    dstream: Tensor | None
    seed: Tensor


def make_inputs(
    case: Case, n_rows: int, n_cols: int, draw: Callable[..., Tensor], parameters: torch.dtype, seed: Tensor
) -> Inputs:
    """Fill the inputs of a case.

    Args:
        case: What they are for.
        n_rows: Rows of `x`.
        n_cols: Columns of `x`.
        draw: Makes a tensor of a shape, as `torch.randn` does.
        parameters: The dtype of weight and bias.
        seed: For dropout.
    """
    shape = (n_rows, n_cols)
    return Inputs(
        x=draw(shape),
        dy=draw(shape),
        # Near what leaves x_hat as it is, as a trained norm has it.
        weight=(1 - case.kind.offset + 0.1 * draw(n_cols)).to(parameters) if case.weight else None,
        bias=draw(n_cols).to(parameters) if case.bias else None,
        residual=draw(shape) if case.residual else None,
        dstream=draw(shape) if case.returns_stream else None,
        seed=seed,
    )


@dataclass(frozen=True)
class Work:
    """A case with its inputs, ready to run again and again.

    Attributes:
        run: Does what is timed.
        stream: What the forward normalised, where that has run already, was not `x` and can be had.
    """

    run: Callable[[], Results]
    stream: Tensor | None = None


def kernel_work(kernels: Any, case: Case, given: Inputs) -> Work:
    """The work of a module with the functions of `fastln_kernels.reference`; for a backward it runs the forward.

    As in training, a backward is given only what it needs.
    """
    dropout: dict[str, Any] = {"dropout": case.dropout, "seed": given.seed} if case.dropout else {}
    forward = NormForward(
        given.x,
        given.weight,
        given.bias,
        case.kind,
        residual=given.residual,
        want_stream=case.returns_stream,
        want_normed=case.keeps_normed,
        **dropout,
    )
    if not case.backward:
        return Work(lambda: pick(kernels.norm_forward(forward), case.results))
    kept = kernels.norm_forward(forward)
    saved = kept.normed if case.keeps_normed else kept.stream if case.residual else given.x
    parameter = given.weight if given.weight is not None else given.bias
    wanted: dict[str, Any] = {f"need_{name}": True for name in case.results}
    backward = NormBackward(
        given.dy,
        saved if case.needs_saved else None,
        given.weight if case.needs_rows else None,
        kept.rstd if case.needs_saved else None,
        case.kind,
        saved_is_normed=case.keeps_normed,
        dstream=given.dstream,
        grad_dtype=torch.float32 if parameter is None else parameter.dtype,
        **wanted,
        **dropout,
    )
    return Work(lambda: pick(kernels.norm_backward(backward), case.results), kept.stream)


def pick(outputs: Any, names: Sequence[str]) -> Results:
    """The named fields of what a kernel's launching function returned."""
    return {name: getattr(outputs, name) for name in names}

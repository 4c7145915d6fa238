"""The operations in both reports (compile and GPU), and how to call fastln's kernels for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastln_kernels.reference import NormBackward, NormForward, NormKind

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = (384, 768, 1024, 1152, 1280, 2048, 4096, 8192, 16384, 32768, 65536)
DROPOUT = 0.125  # a multiple of 1/65536, as fastln needs, so that all implementations scale by the same number

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A norm and the results that are requested from it.

    Attributes:
        name: Its name on the command line and in the rows.
        kind: The kind of norm.
        results: The results to return: `y` (and `stream`), or gradients.
        weight: Whether it has a weight.
        bias: Whether it has a bias.
        residual: Whether its input is the sum `residual + dropout(x)`.
        dropout: Dropout probability of `x`, before the sum.
        keeps_normed: Whether the sum itself is not returned (post-norm). fastln then keeps x_hat for the backward.
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
        """Whether gradients are requested."""
        return "y" not in self.results

    @property
    def returns_stream(self) -> bool:
        """Whether the forward returns the sum, so that the sum's other uses contribute to its gradient."""
        return self.residual and not self.keeps_normed

    @property
    def needs_rows(self) -> bool:
        """Whether gradients of rows are requested."""
        return bool({"dx", "dresidual"} & set(self.results))

    def useful_bytes(self, n_rows: int, n_cols: int, itemsize: int) -> int:
        """Return the bytes of these tensors."""
        return self.tensors * n_rows * n_cols * itemsize

    @property
    def writes_rows(self) -> bool:
        """Whether rows are written."""
        return self.needs_rows or not self.backward

    @property
    def needs_saved(self) -> bool:
        """Whether the requested gradients depend on the norm's input."""
        return self.results != ("dbias",)

    @property
    def tensors(self) -> int:
        """Return how many tensors of rows any implementation must read or write.

        A forward reads x (and the residual) and writes y (and the sum, or what the backward keeps instead). A backward
        reads dy, the norm's input and the gradient of the returned sum, each if it is needed. It writes dx and
        dresidual, which are one tensor without dropout.
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
    """The inputs of a case; None for inputs that it does not have."""

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
    """Create the inputs of a case.

    Args:
        case: The case.
        n_rows: Rows of `x`.
        n_cols: Columns of `x`.
        draw: A function that makes a tensor of a given shape, like `torch.randn`.
        parameters: The dtype of weight and bias.
        seed: The seed for dropout.
    """
    shape = (n_rows, n_cols)
    return Inputs(
        x=draw(shape),
        dy=draw(shape),
        # Close to the weight that leaves x_hat unchanged, as in a trained norm.
        weight=(1 - case.kind.offset + 0.1 * draw(n_cols)).to(parameters) if case.weight else None,
        bias=draw(n_cols).to(parameters) if case.bias else None,
        residual=draw(shape) if case.residual else None,
        dstream=draw(shape) if case.returns_stream else None,
        seed=seed,
    )


@dataclass(frozen=True)
class Work:
    """A case with its inputs, ready to run repeatedly.

    Attributes:
        run: The function that is timed.
        stream: The sum that the forward normalised, if the forward has run, had a sum, and makes it available.
    """

    run: Callable[[], Results]
    stream: Tensor | None = None


def kernel_work(kernels: Any, case: Case, given: Inputs) -> Work:
    """Return the work of a module with the functions of `fastln_kernels.reference`. For a backward, run the forward.

    As in training, a backward receives only what it needs.
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
    """Return the named fields of a launching function's results."""
    return {name: getattr(outputs, name) for name in names}

"""The implementations to compare: fastln's kernels and its peers', each called as its users call it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from norm_cases import Case, Inputs, Results, Work, kernel_work
from report_rows import notes
from torch import Tensor

from fastln_kernels import norm


@dataclass(frozen=True)
class Implementation:
    """One library's kernels.

    Attributes:
        name: Its name in the rows.
        prepare: A function that makes the work. For a backward, it runs the forward.
        note: A function that says how a case is done differently than requested, or "".
        roundings: How many times it rounds to the dtype beyond the definition, if dropout and a sum precede the norm.
    """

    name: str
    prepare: Callable[[Case, Inputs], Work]
    note: Callable[[Case], str] = lambda _: ""
    roundings: int = 0


Loaded = tuple[Implementation | None, str]
Leaves = dict[str, Tensor]
Function = Callable[[Leaves], tuple[Tensor, Tensor | None]]
Norm = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]

GRADIENTS = {"x": "dx", "residual": "dresidual", "weight": "dweight", "bias": "dbias"}
APART = "dropout and sum by torch, separately"


def autograd_work(function_for: Callable[[Case, Inputs], Function], case: Case, given: Inputs) -> Work:
    """Return the work of a peer that is called through autograd.

    In a forward every input requires a gradient, as in training. A backward computes only the requested gradients.

    Args:
        function_for: Returns a function from the leaves to `y` and the sum (None if there is none).
        case: The case.
        given: The inputs.
    """
    leaves: Leaves = {}
    for name, gradient in GRADIENTS.items():
        tensor = getattr(given, name)
        if tensor is not None:
            leaves[name] = tensor.detach().requires_grad_(not case.backward or gradient in case.results)
    function = function_for(case, given)
    if not case.backward:

        def forward() -> Results:
            y, stream = function(leaves)
            return {"y": y, "stream": stream} if case.returns_stream and stream is not None else {"y": y}

        return Work(forward)
    y, stream = function(leaves)
    wanted = {gradient: leaves[name] for name, gradient in GRADIENTS.items() if gradient in case.results}
    # Use copies, because Liger overwrites dy with dx. Later calls then read other values, which takes the same time.
    outputs, gradients = [y], [given.dy.clone()]
    if case.returns_stream:
        assert stream is not None
        assert given.dstream is not None
        outputs, gradients = [*outputs, stream], [*gradients, given.dstream.clone()]

    def run() -> Results:
        found = torch.autograd.grad(outputs, list(wanted.values()), gradients, retain_graph=True)
        return dict(zip(wanted, found, strict=True))

    return Work(run, None if stream is None else stream.detach())


def composed(case: Case, norm_function: Norm) -> Function:
    """Combine torch's dropout and sum, if the case has them, with a norm: for peers that do not fuse the three."""

    def function(leaves: Leaves) -> tuple[Tensor, Tensor | None]:
        x, weight, bias = leaves["x"], leaves.get("weight"), leaves.get("bias")
        if not case.residual:
            return norm_function(x, weight, bias), None
        stream = leaves["residual"] + (F.dropout(x, case.dropout) if case.dropout else x)
        return norm_function(stream, weight, bias), stream

    return function


def torch_function(case: Case) -> Function:
    """Return the case in torch's own functions, composed as in transformers' models."""
    kind = case.kind

    def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, kind.eps)

    def rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        shape = x.shape[-1:]
        if kind.round_normed and weight is not None:
            return weight * F.rms_norm(x, shape, None, kind.eps)
        if kind.offset and weight is not None:
            return F.rms_norm(x.float(), shape, kind.offset + weight.float(), kind.eps).to(x.dtype)
        return F.rms_norm(x, shape, weight, kind.eps)

    return composed(case, layer_norm if kind.centre else rms_norm)


def surplus(case: Case, always: Sequence[str]) -> str:
    """Say which gradients are computed without being requested, out of those that are always computed."""
    has = {"dx": True, "dweight": case.weight, "dbias": case.bias}
    extra = [name for name in always if name not in case.results and has[name]]
    return f"computes {' and '.join(extra)} too" if case.backward and extra else ""


def load_fastln() -> Loaded:
    """Load fastln's kernels, without the operators around them. A CUDA graph would not contain those anyway."""
    return Implementation("fastln", functools.partial(kernel_work, norm)), ""


def load_torch() -> Loaded:
    """Load torch, with one operation after the other."""

    def note(case: Case) -> str:
        return "dropout, sum and norm separately" if case.residual else ""

    prepare = functools.partial(autograd_work, lambda case, given: torch_function(case))
    return Implementation("torch eager", prepare, note, roundings=2), ""


def load_compile() -> Loaded:
    """Load the same functions through torch.compile, in its default mode."""
    import torch._dynamo
    import torch._functorch.config

    # Otherwise a compiled backward could run only once, but here it runs several times.
    torch._functorch.config.donated_buffer = False

    @functools.lru_cache(maxsize=1)
    def compiled(case: Case, shape: torch.Size, dtype: torch.dtype) -> Function:
        # Without a reset, dynamo gives up after a few shapes of one function, or compiles it for any shape.
        torch._dynamo.reset()
        return torch.compile(torch_function(case), dynamic=False)

    def function_for(case: Case, given: Inputs) -> Function:
        return compiled(case, given.x.shape, given.x.dtype)

    return Implementation("torch.compile", functools.partial(autograd_work, function_for), roundings=2), ""


def load_liger() -> Loaded:
    """Load Liger-Kernel's layer_norm and rms_norm. They have no dropout and no residual, and always compute dx."""
    try:
        ops = importlib.import_module("liger_kernel.ops")
    except ImportError as error:
        return None, f"not installed ({error})"

    def function_for(case: Case, given: Inputs) -> Function:
        kind = case.kind
        # Its layer norm requires weight and bias.
        ones = None if case.weight else torch.ones_like(given.x[0])
        zeros = None if case.bias else torch.zeros_like(given.x[0] if given.weight is None else given.weight)

        def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return ops.LigerLayerNormFunction.apply(
                x, ones if weight is None else weight, zeros if bias is None else bias, kind.eps
            )

        def rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            # "gemma" computes everything in float32, as the definition does except for Llama's rounding.
            mode = "llama" if kind.round_normed else "gemma"
            return ops.LigerRMSNormFunction.apply(x, weight, kind.eps, kind.offset, mode)

        return composed(case, layer_norm if kind.centre else rms_norm)

    def note(case: Case) -> str:
        in_place = case.backward and not case.kind.centre
        lacks = case.kind.centre and not case.bias
        return notes(
            APART if case.dropout else "sum by torch, separately" if case.residual else "",
            surplus(case, ("dx",)),
            "writes dx over dy" if in_place else "",
            "with a bias of zeros" + ("" if case.weight else " and a weight of ones") if lacks else "",
        )

    return Implementation("liger", functools.partial(autograd_work, function_for), note, roundings=2), ""


def load_flash() -> Loaded:
    """Load flash-attention's Triton norm. It fuses dropout and residual, and computes every gradient."""
    try:
        module = importlib.import_module("flash_attn.ops.triton.layer_norm")
    except ImportError as error:
        return None, f"not installed ({error})"

    def function_for(case: Case, given: Inputs) -> Function:
        ones = None if case.weight else torch.ones_like(given.x[0])

        def function(leaves: Leaves) -> tuple[Tensor, Tensor | None]:
            outputs = module.layer_norm_fn(
                *(leaves["x"], leaves.get("weight", ones), leaves.get("bias")),
                residual=leaves.get("residual"),
                eps=case.kind.eps,
                dropout_p=case.dropout,
                prenorm=case.returns_stream,
                is_rms_norm=not case.kind.centre,
                **({"zero_centered_weight": True} if case.kind.offset else {}),
            )
            return outputs if case.returns_stream else (outputs, None)

        return function

    def note(case: Case) -> str:
        return notes(
            surplus(case, ("dx", "dweight", "dbias")),
            "" if case.weight else "with a weight of ones",
            "does not round x_hat" if case.kind.round_normed else "",
        )

    return Implementation("flash-attn", functools.partial(autograd_work, function_for), note), ""


LOADERS = {
    "fastln": load_fastln,
    "torch eager": load_torch,
    "torch.compile": load_compile,
    "liger": load_liger,
    "flash-attn": load_flash,
}


def load_all() -> tuple[list[Implementation], dict[str, str]]:
    """Return every available implementation, and why the others are missing."""
    found, missing = [], {}
    for name, load in LOADERS.items():
        implementation, reason = load()
        if implementation is None:
            missing[name] = reason
        else:
            found.append(implementation)
    return found, missing

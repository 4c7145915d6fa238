"""Which way a call of an operation goes: past the dispatcher, through its operator, or through its definition."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def overridable(function: FunctionT) -> FunctionT:
    """Have tensors among the positional arguments that have `__torch_function__` decide about a call, as torch has."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if has_torch_function(args):
            return handle_torch_function(call, args, *args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def needs_operator(*tensors: Tensor | None) -> bool:
    """Whether something must see the operator: a compiler, a tracer, a mode, a tensor that is more than numbers."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack():
        return True
    for x in tensors:  # noqa: SIM110 - a generator would double the time
        if x is not None and (type(x) not in (Tensor, nn.Parameter) or x.is_meta):
            return True
    return False


def is_transformed() -> bool:
    """Whether torch.func's transforms or forward-mode derivatives are at work, which operators do not have."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with one of these."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def define(name: str, signature: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator: through `torch.library` and not its `custom_op`, whose wrapper doubles the time of a call."""
    torch.library.define(name, signature, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", function)
    torch.library.register_fake(name, fake)

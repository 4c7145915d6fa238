"""Calls an operation in one of three ways: without the dispatcher, through its operator, or by its plain definition.

Under `torch.compile`, and wherever else operators must be visible (fake tensors, tracing, dispatch modes), a call goes
through the operator. In plain eager mode it bypasses the dispatcher and runs the same functions. That takes a fraction
of the time per call: an operator written in Python costs several times as much as a small LayerNorm. Under torch.func's
transforms and forward-mode derivatives, the definition runs op by op. torch can transform that, but it cannot transform
an operator with only a reverse-mode gradient.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from fastln.ops.settings import REFERENCE, OpSettings

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def overridable(function: FunctionT) -> FunctionT:
    """Let positional tensors with `__torch_function__` handle a call, as torch's own functions do."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if has_torch_function(args):
            return handle_torch_function(call, args, *args, **kwargs)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


class Arguments(Protocol):
    """The arguments of an operation besides its tensors: a named tuple. Operators get those up to the settings."""

    @staticmethod
    def schema() -> str:
        """Return how an operator's schema declares the scalars."""

    @property
    def flat(self) -> tuple[Any, ...]:
        """The arguments as scalars, as the operator takes them."""

    @classmethod
    def of(cls, *flat: Any) -> Self:
        """Rebuild the arguments from the scalars of `flat`."""

    def _replace(self, *, settings: OpSettings) -> Self: ...


class Ways(NamedTuple):
    """The three ways to call an operation.

    Attributes:
        operator: What compilers and tracers see; takes the tensors and `arguments.flat`.
        function: The autograd function of eager mode; takes the tensors and the arguments.
        plain: Computes without autograd; takes the tensors and the arguments.
    """

    operator: Callable[..., Any]
    function: type[torch.autograd.Function]
    plain: Callable[..., Any]


def call(ways: Ways, tensors: tuple[Tensor | None, ...], arguments: Arguments) -> Any:
    """Call an operation in the way that the surrounding context needs.

    Args:
        ways: The operation's ways.
        tensors: Its tensors; None for those that are absent.
        arguments: Its other arguments.
    """
    if needs_operator(*tensors):
        return ways.operator(*tensors, *arguments.flat)
    if is_transformed():
        return ways.plain(*tensors, arguments._replace(settings=REFERENCE))
    if wants_gradient(*tensors):
        return ways.function.apply(*tensors, arguments)
    return ways.plain(*tensors, arguments)


def needs_operator(*tensors: Tensor | None) -> bool:
    """Whether something must see the operator: a compiler, a tracer, a mode or a tensor subclass."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack():
        return True
    for x in tensors:  # noqa: SIM110 - a generator would double the time
        if x is not None and (type(x) not in (Tensor, nn.Parameter) or x.is_meta):
            return True
    return False


def is_transformed() -> bool:
    """Whether torch.func's transforms or forward-mode derivatives are active; operators support neither."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records operations on any of these."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def define(
    name: str, signature: str, arguments: type[Arguments], function: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Define an operator with `torch.library`, not with `custom_op`, whose wrapper doubles the time of a call.

    Args:
        name: The operator's name, such as `fastln::norm`.
        signature: Its signature in torch's schema language. The arguments come last, as in `schema`.
        arguments: The class of the arguments; both functions take one of these in place of the scalars.
        function: Computes it, on every device.
        fake: Makes its results without values.
    """
    torch.library.define(name, signature, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", _taking_scalars(function, arguments))
    torch.library.register_fake(name, _taking_scalars(fake, arguments))


def _taking_scalars(function: Callable[..., Any], arguments: type[Arguments]) -> Callable[..., Any]:
    n_scalars = arguments.schema().count(",") + 1

    def call(*given: Any) -> Any:
        return function(*given[:-n_scalars], arguments.of(*given[-n_scalars:]))

    return call

"""Late logits: a language-model head's output, computed only when something other than a loss needs it.

Models compute logits in one place and their loss in another, after some views and casts. `LazyLogits` passes through
that code instead of the logits. When it reaches `torch.nn.functional.cross_entropy`, `fastln.ops.linear_cross_entropy`
computes the loss from the hidden states and the head's weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from fastln import ops
from fastln.errors import FastLNError
from fastln.late.cross_entropy import CrossEntropy, bind
from fastln.late.layout import has_whole_rows, is_basic
from fastln.late.modes import Modes
from fastln.late.rows import LazyRows, as_they_are, computed, labelled
from fastln.late.tensor import GRAD, Call, LateTensor, Unwritten, as_it_is_now, asks_for_gradient
from fastln_kernels.reference_int8 import Weight8


class _Head:
    """The inputs of all late logits of one call of a head: `F.linear(hidden, weight, bias)`.

    Attributes:
        has_loss: Whether a loss was computed without the logits.
        wants_gradient: Whether that loss must still send its gradient through them.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rounded: Weight8 | None) -> None:
        self.hidden, self.weight, self.bias, self.rounded = hidden, weight, bias, rounded
        self.has_loss = self.wants_gradient = False
        self._modes = Modes(hidden.device)
        parts = (hidden, weight, bias)
        self.unwritten = Unwritten(part for part in parts if part is not None and not isinstance(part, LazyRows))

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias in the dtype of `hidden`."""
        self.unwritten.check()
        dtype = self.hidden.dtype
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)

    def logits(self, steps: tuple[Call, ...]) -> Tensor:
        """Compute the linear layer and apply the steps to its result."""
        with self._modes.restored(), torch.autocast(self.hidden.device.type, enabled=False):
            logits = F.linear(computed(self.hidden), *self.parameters())
            return reduce(lambda values, step: step(values), steps, logits)


@dataclass(frozen=True, eq=False)
class _Recipe:
    """How late logits, or a loss without them, are computed.

    Attributes:
        head: The inputs.
        steps: The calls that lead from the linear layer's result to these logits.
        hidden: The hidden states of these rows only, for a loss.
        scale, softcap: For a loss, as in `ops.linear_cross_entropy`.
        origin: The late logits that these are a view of; the last step makes the view.
    """

    head: _Head
    steps: tuple[Call, ...]
    hidden: Tensor
    scale: float = 1.0
    softcap: float | None = None
    origin: LazyLogits | None = None


class LazyLogits(LateTensor):
    """`F.linear(hidden, weight, bias)`, perhaps scaled and softly capped, not computed yet.

    Views of whole rows, slices of positions, casts to float32, products with positive numbers and `tanh` stay late.
    `cross_entropy` over rows and class labels computes its loss without the logits. Every other use computes them,
    once, with the values, gradients and aliasing of stock logits. The loss is differentiable once. Its gradient
    bypasses the logits, unless `retain_grad`, `register_hook` or `torch.autograd.grad` asks for the logits' gradient.

    `LazyLogits.of` makes them.
    """

    _recipe: _Recipe
    _twin: Tensor  # on meta: gives shape and strides, and shows whether a call returns a view
    _own: Tensor | None  # once computed

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None, rounded: Weight8 | None = None) -> LazyLogits:
        """Return late logits for `F.linear(hidden, weight, bias)`, under the current autocast mode.

        Args:
            hidden: `(..., d)`, with at least one dimension before the last.
            weight: `(n_classes, d)`, with the dtype of `hidden` and two classes or more.
            bias: `(n_classes,)`, same dtype, or None.
            rounded: The weight in 8 bits, for a loss without logits; None for exact products.
        """
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        if isinstance(hidden, LazyRows):
            hidden = as_they_are(hidden) if hidden._waits() else hidden._read()
        bias = None if bias is None else as_it_is_now(bias)
        twin = torch.empty((*hidden.shape[:-1], len(weight)), dtype=hidden.dtype, device="meta")
        return _lazy(_OfHead, [], twin, _Recipe(_Head(hidden, weight, bias, rounded), (), hidden), hidden, weight, bias)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As for every late tensor, except for calls that ask for a gradient that would bypass these logits."""
        late = [x for x in tree_leaves((args, kwargs)) if isinstance(x, LateTensor)]
        if asks_for_gradient(func, args) or func in _MAY_ASK:
            direct = all(isinstance(x, LazyLogits) and x._want_gradient() for x in late)
        else:
            direct = func in _OF_ASKED and all(isinstance(x, LazyLogits) and x._asked() for x in late)
        if direct:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def _later(cls, call: Call) -> Any:
        logits = call.args[0] if call.func in _RULES and call.args else None
        if not isinstance(logits, LazyLogits) or not logits._waits():
            return None
        return _RULES[call.func](logits, call.open_at(0))

    def _waits(self) -> bool:
        """Whether neither these logits nor any that they are a view of have been computed."""
        origin = self._recipe.origin
        return self._own is None and (origin is None or origin._waits())

    def _compute(self, writes: bool = False) -> Tensor:
        recipe = self._recipe
        if self._own is None and recipe.origin is not None:
            self._own = recipe.steps[-1](recipe.origin._compute())
        elif self._own is None:
            self._own = recipe.head.logits(recipe.steps)
            if recipe.head.wants_gradient:
                with torch.inference_mode(False), torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
                    self._own = _Computed.apply(self, self._own.detach())
        return self._own

    def _source(self) -> _Head:
        if isinstance(hidden := self._recipe.head.hidden, LazyRows):
            hidden._held[:] = [hidden._source()]
        return self._recipe.head

    def _asked(self) -> bool:
        """Whether these logits, and not their computed values, have the gradient."""
        return (self._recipe.head.wants_gradient or self._own is None) and self._recipe.origin is None

    def _want_gradient(self) -> bool:
        """Make a loss that was computed without these logits send its gradient through them; False if there is none."""
        head = self._recipe.head
        if not head.has_loss or self._recipe.origin is not None:
            return False
        if self._own is not None and not head.wants_gradient:
            raise FastLNError(
                "these logits were read before their gradient was asked for, and their loss was computed without them; "
                'ask first, or use fastln.prepare(model, ..., without=("late_logits",))'
            )
        self._held[:] = [self._source()]
        head.wants_gradient = True
        return True


_PROPERTIES = vars(torch._C.TensorBase)
# Who reads `grad_fn` may set hooks on it. Without a loss these read the logits, as every other use does.
_MAY_ASK = {GRAD.__get__, _PROPERTIES["grad_fn"].__get__}
_OF_ASKED = {GRAD.__set__, _PROPERTIES["retains_grad"].__get__}


# The autograd nodes of late logits. They serve uses that only autograd sees, and requests for the logits' gradient.
# All other uses have the history of the computed logits, or of the loss.


def _lazy(node: type[torch.autograd.Function], held: list[_Head], twin: Tensor, recipe: _Recipe, *args: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        logits = node.apply(held, twin, *args)
    logits._held, logits._twin, logits._recipe, logits._own = held, twin, recipe, None
    return logits


def _head(held: list[_Head]) -> _Head:
    if not held:
        raise FastLNError("an autograd.Function took late logits without reading them; pass it `logits + 0`")
    return held[0]


class _OfHead(torch.autograd.Function):
    """The head's linear layer."""

    @staticmethod
    def forward(
        ctx: Any, held: list[_Head], twin: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.held, ctx.bias_dtype = held, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return LazyLogits._wrapper(twin, hidden.device)

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor | None) -> tuple[Tensor | None, ...]:
        if dlogits is None:
            return (None,) * 5
        head = _head(ctx.held)
        weight, _ = head.parameters()
        rows = dlogits.reshape(-1, dlogits.shape[-1])
        dhidden = dweight = dbias = None
        if ctx.needs_input_grad[2]:
            dhidden = dlogits @ weight
        if ctx.needs_input_grad[3]:
            hidden = computed(head.hidden)
            dweight = (rows.T @ hidden.reshape(-1, hidden.shape[-1])).to(head.weight.dtype)
        if ctx.needs_input_grad[4]:
            dbias = rows.sum(0).to(ctx.bias_dtype)
        return None, None, dhidden, dweight, dbias


class _OfStep(torch.autograd.Function):
    """The last step to late logits, from the logits before it."""

    @staticmethod
    def forward(ctx: Any, held: list[_Head], twin: Tensor, steps: tuple[Call, ...], logits: Tensor) -> Tensor:
        ctx.held, ctx.steps = held, steps
        ctx.set_materialize_grads(False)
        return LazyLogits._wrapper(twin, logits.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 4
        x = _head(ctx.held).logits(ctx.steps[:-1]).detach().requires_grad_()
        with torch.enable_grad():
            return None, None, None, *torch.autograd.grad(ctx.steps[-1](x), x, dy)


class _Computed(torch.autograd.Function):
    """The computed values of late logits, with a history that goes through the late logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _Loss(torch.autograd.Function):
    """A loss computed without its logits. Its gradient bypasses them too, unless their gradient was asked for."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, logits: LazyLogits, labels: Tensor, cross_entropy: CrossEntropy) -> Tensor:
        ctx.held, ctx.steps, ctx.cross_entropy = logits._held, logits._recipe.steps, cross_entropy
        ctx.save_for_backward(labels)
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.held or not ctx.held[0].wants_gradient:
            return dy, None, None, None
        logits = ctx.held[0].logits(ctx.steps).detach().requires_grad_()
        with torch.enable_grad():
            loss = ctx.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, *ctx.saved_tensors)
        return None, *torch.autograd.grad(loss, logits, dy.to(loss.dtype)), None, None


# Each rule returns the result of a call on late logits, or None if the call needs the computed logits. `call` is open
# at their place. Made with the twin, it gives shape and strides, and shows whether the result is a view.


def _derived(logits: LazyLogits, call: Call, **changes: Any) -> LazyLogits:
    """Return the late result of a call on late logits; `changes` says how the recipe changes."""
    twin, old = call(logits._twin), logits._recipe
    if twin is logits._twin:
        return logits
    old.head.unwritten.check()
    origin = logits if twin._is_view() else None
    recipe = replace(old, steps=(*old.steps, call), origin=origin, **changes)
    return _lazy(_OfStep, logits._held, twin, recipe, recipe.steps, logits)


def _same_rows(logits: LazyLogits, call: Call) -> Tensor | None:
    """Reshape the leading dimensions, or pick some rows."""
    is_index = call.func is Tensor.__getitem__
    if is_index and not is_basic(call.args[1]):
        return None
    twin, hidden = call(logits._twin), logits._recipe.hidden
    if twin.ndim < 2 or twin.dtype != logits.dtype or not has_whole_rows(twin, logits.shape[-1]):
        return None
    shape = (*twin.shape[:-1], hidden.shape[-1])
    hidden = hidden[call.args[1]] if is_index else hidden.reshape(shape)
    return _derived(logits, call, hidden=hidden) if hidden.shape == shape else None  # else a slice of all classes


def _contiguous(logits: LazyLogits, call: Call) -> Tensor | None:
    return None if len(call.args) > 1 or call.kwargs else _derived(logits, call)


def _cast(logits: LazyLogits, call: Call) -> Tensor | None:
    """Widen to float32, in which the loss is computed anyway."""
    if "memory_format" in call.kwargs:
        return None
    empty = torch.empty(0, dtype=logits.dtype, device=logits.device)
    result = call(empty)
    if result is empty:
        return logits
    widens = result.dtype == torch.float32 and logits.dtype.itemsize < 4 and result.device == logits.device
    return _derived(logits, Call(Tensor.float, (None,), {})) if widens else None


def _scale(logits: LazyLogits, call: Call) -> Tensor | None:
    """Multiply or divide by a number."""
    if call.kwargs or len(call.args) != 2 or type(call.args[1]) not in (int, float) or not 0 < call.args[1] < math.inf:
        return None
    factor = call.args[1] if call.func is Tensor.mul else 1 / call.args[1]
    scale, softcap = logits._recipe.scale, logits._recipe.softcap
    return _derived(logits, call, scale=scale * factor, softcap=None if softcap is None else softcap * factor)


def _tanh(logits: LazyLogits, call: Call) -> Tensor | None:
    return None if logits._recipe.softcap is not None or call.kwargs else _derived(logits, call, softcap=1.0)


def _cross_entropy(logits: LazyLogits, call: Call) -> Tensor | None:
    bound = bind(logits, *call.args[1:], **call.kwargs)
    if bound is None or bound[2].weight is not None:
        return None
    _, labels, cross_entropy = bound
    recipe = logits._recipe
    one = torch.zeros(1, dtype=logits.dtype, device=logits.device)
    dtype = F.cross_entropy(one[None], torch.zeros_like(one, dtype=torch.int64)).dtype  # depends on autocast too
    with torch.autocast(logits.device.type, enabled=False):
        weight, bias = recipe.head.parameters()
        if cross_entropy.reduction == "none":
            hidden, its_labels = computed(recipe.hidden), labels
        else:
            hidden, its_labels = labelled(recipe.hidden, labels, cross_entropy.ignore_index)
        loss = ops.linear_cross_entropy(
            hidden,
            weight,
            bias,
            its_labels,
            scale=recipe.scale,
            softcap=recipe.softcap,
            ignore_index=cross_entropy.ignore_index,
            label_smoothing=cross_entropy.label_smoothing,
            reduction=cross_entropy.reduction,
            rounded=recipe.head.rounded,
        ).to(dtype)
    recipe.head.has_loss = True
    with torch._C.DisableTorchFunctionSubclass():
        return _Loss.apply(loss, logits, labels, cross_entropy)


_RULES: dict[Callable[..., Any], Callable[[LazyLogits, Call], Tensor | None]] = {
    **dict.fromkeys((Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten), _same_rows),
    Tensor.__getitem__: _same_rows,
    Tensor.contiguous: _contiguous,
    **dict.fromkeys((Tensor.float, Tensor.to), _cast),
    **dict.fromkeys((Tensor.mul, Tensor.div), _scale),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
    F.cross_entropy: _cross_entropy,
}

"""Logits that wait: a language-model head's output that is computed only when something other than a loss needs it.

Models compute logits in one place and their loss in another, some views and casts later. `LazyLogits` passes through
that code as the tensor that it stands for, and when it comes to `torch.nn.functional.cross_entropy`, the loss is
computed by `fastln.ops.linear_cross_entropy` from what the logits would have been made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastln import ops
from fastln.errors import FastLNError
from fastln.late.rows import LazyRows, computed, labelled
from fastln.late.tensor import LateTensor
from fastln.ops.linear_cross_entropy import IGNORE_INDEX, shaped_logits


class LazyLogits(LateTensor):
    """`F.linear(hidden, weight, bias)`, scaled and softly capped perhaps, not computed yet.

    Views of whole rows, slices of positions, casts to float32, products with positive numbers and `tanh` stay lazy; so
    does the loss of `cross_entropy` over rows and class labels. Every other use computes the logits, once, and works on
    those from then on: with the same values, gradients and aliasing as if they had been there from the start, and at
    the cost that this has. The loss is differentiable once, and sends no gradient through the logits (`logits.grad`
    stays None).

    Tensors are met in two places. `__torch_function__` sees calls from Python, with autograd still to come. What does
    not pass there, such as the arguments of an `autograd.Function`, reaches `__torch_dispatch__`, below autograd; for
    that case the tensor has a `grad_fn` of its own, the gradient formula of a linear layer.

    Made by `LazyLogits.of`.
    """

    _hidden: Tensor  # with its autograd history
    _weight: Tensor
    _bias: Tensor | None
    _shape: _Shape
    _versions: tuple[int, ...]
    _origin: tuple[LazyLogits, Callable[[Tensor], Tensor]] | None  # of what this is a view, and how
    _computed: Tensor | None  # once computed

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LazyLogits:
        """Stand for `F.linear(hidden, weight, bias)`, under the autocast of now.

        Args:
            hidden: `(..., d)`, of at least one dimension more.
            weight: `(n_classes, d)`, of the dtype of `hidden`, two classes or more.
            bias: `(n_classes,)`, likewise, or None.
        """
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        shape = torch.Size((*hidden.shape[:-1], len(weight)))
        twin = torch.empty(shape, dtype=hidden.dtype, device="meta")
        return _lazy(hidden, weight, bias, twin, None, _Shape())

    @classmethod
    def _later(cls, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule = _RULES.get(func)
        if rule is None or not args or not isinstance(args[0], cls) or not args[0]._waits():
            return None
        return rule(args[0], func, args[1:], kwargs)

    def _waits(self) -> bool:
        """Whether neither these logits nor any that they are a view of have been computed."""
        return self._computed is None and (self._origin is None or self._origin[0]._waits())

    def _parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return hidden, weight and bias, of one dtype."""
        self._check_unwritten()
        dtype = self._hidden.dtype
        return self._hidden, self._weight.to(dtype), None if self._bias is None else self._bias.to(dtype)

    def _check_unwritten(self) -> None:
        if _versions(self._hidden, self._weight, self._bias) != self._versions:
            raise FastLNError(
                "these logits were left uncomputed, and what they are made of (hidden states, the head's weight) has "
                "been written to since; look at them before the optimizer's step"
            )

    def _compute(self, writes: bool = False) -> Tensor:
        """Return the logits, computed at the first call, with their autograd history whatever the modes of now."""
        if self._computed is None:
            # Leaving inference mode turns autograd on, even where it was off for another reason.
            with torch.inference_mode(False), torch.autocast(self.device.type, enabled=False):
                if self._origin is None:
                    hidden, weight, bias = self._parts()
                    logits = F.linear(computed(hidden), weight, bias)
                    self._computed = shaped_logits(logits, *self._shape).to(self.dtype)
                else:
                    base, view = self._origin
                    self._computed = view(base._compute())
        return self._computed


class _Shape(NamedTuple):
    """What becomes of the linear layer's result: arguments of `shaped_logits`."""

    scale: float = 1.0
    softcap: float | None = None


class _Wrap(torch.autograd.Function):
    """Makes a `LazyLogits`; its gradient formula is that of the linear layer, what shapes its result, and a cast."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, twin: Tensor, shape: _Shape) -> Tensor:
        need_dhidden, need_dweight = ctx.needs_input_grad[:2]
        capped = shape.softcap is not None
        # Rows that wait are no numbers yet that hooks on saved tensors could see.
        ctx.waiting = hidden if isinstance(hidden, LazyRows) else None
        ctx.save_for_backward(
            hidden if ctx.waiting is None and (need_dweight or capped) else None,
            weight if need_dhidden or capped else None,
            bias if capped else None,
        )
        ctx.set_materialize_grads(False)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.shape = shape
        return Tensor._make_wrapper_subclass(
            LazyLogits, twin.shape, strides=twin.stride(), dtype=twin.dtype, device=hidden.device
        )

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor | None) -> tuple[Tensor | None, ...]:
        if dlogits is None:
            return (None,) * 5
        hidden, weight, bias = ctx.saved_tensors
        if ctx.waiting is not None:
            hidden = computed(ctx.waiting).detach()
        dtype, weight_dtype, bias_dtype = ctx.dtypes
        need_dhidden, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        scale, softcap = ctx.shape
        if softcap is not None:
            z = F.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
            dlogits = dlogits * (1 - torch.tanh(z * (scale / softcap)).square())
        dlogits = (dlogits * scale).to(dtype)
        rows = dlogits.reshape(-1, dlogits.shape[-1])
        dhidden = dlogits @ weight.to(dtype) if need_dhidden else None
        dweight = (rows.T @ hidden.reshape(-1, hidden.shape[-1])).to(weight_dtype) if need_dweight else None
        dbias = rows.sum(0).to(bias_dtype) if need_dbias else None
        return dhidden, dweight, dbias, None, None


def _lazy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    twin: Tensor,
    origin: tuple[LazyLogits, Callable[[Tensor], Tensor]] | None,
    shape: _Shape,
) -> LazyLogits:
    """Make logits with the shape, strides and dtype of `twin`, a meta tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        logits: LazyLogits = _Wrap.apply(hidden, weight, bias, twin, shape)
    logits._hidden, logits._weight, logits._bias, logits._shape = hidden, weight, bias, shape
    logits._versions = _versions(hidden, weight, bias)
    logits._origin, logits._computed = origin, None
    return logits


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if t is None else t._n_writes if isinstance(t, LazyRows) else t._version for t in tensors)


# Each rule returns what a call of `func` is, done lazily, or None where it has to be done on computed logits. The call
# is made on an empty twin first: its result tells shape and strides, and whether it is a view.


def _twin(logits: LazyLogits) -> Tensor:
    return torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="meta")


def _same_rows(
    logits: LazyLogits, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Shape the rows anew or pick some of them."""
    is_index = func is Tensor.__getitem__
    if is_index and not all(isinstance(part, slice | int | type(...)) for part in _as_tuple(args[0])):
        return None
    if not is_index and not all(isinstance(size, int) for arg in (*args, *kwargs.values()) for size in _as_tuple(arg)):
        return None
    twin = _twin(logits)
    result = func(twin, *args, **kwargs)
    n_classes = twin.shape[-1]
    if result.ndim < 2 or result.shape[-1] != n_classes or result.stride(-1) != 1:
        return None  # only the dimension of the classes, two or more, has stride 1
    hidden = logits._hidden
    d = hidden.shape[-1]
    hidden = hidden[args[0]] if is_index else hidden.reshape(*result.shape[:-1], d)
    if hidden.shape != (*result.shape[:-1], d):
        return None  # a slice of the classes that names all of them
    return _derived(logits, hidden, result, twin, lambda values: func(values, *args, **kwargs))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _contiguous(
    logits: LazyLogits, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    twin = _twin(logits)
    return None if args or kwargs else _derived(logits, logits._hidden, func(twin), twin, func)


def _cast(
    logits: LazyLogits, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Widen to float32, in which the loss is computed anyway."""
    empty = torch.empty(0, dtype=logits.dtype, device=logits.device)
    result = func(empty, *args, **kwargs)
    if result is empty:
        return logits
    if result.dtype != torch.float32 or logits.dtype == torch.float64 or result.device != logits.device:
        return None
    twin = _twin(logits)
    return _derived(logits, logits._hidden, twin.float(), twin, func)


def _scale(
    logits: LazyLogits, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Multiply or divide by a number."""
    if kwargs or len(args) != 1 or type(args[0]) not in (int, float) or not 0 < args[0] < math.inf:
        return None
    factor = args[0] if func is Tensor.mul else 1 / args[0]
    scale, softcap = logits._shape
    shape = _Shape(scale * factor, None if softcap is None else softcap * factor)
    twin = _twin(logits)
    return _derived(logits, logits._hidden, func(twin, *args), twin, func, shape)


def _tanh(
    logits: LazyLogits, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    if args or kwargs or logits._shape.softcap is not None:
        return None
    twin = _twin(logits)
    return _derived(logits, logits._hidden, func(twin), twin, func, logits._shape._replace(softcap=1.0))


def _derived(
    logits: LazyLogits,
    hidden: Tensor,
    result: Tensor,
    twin: Tensor,
    func: Callable[[Tensor], Tensor],
    shape: _Shape | None = None,
) -> LazyLogits:
    if result is twin:
        return logits
    logits._check_unwritten()
    origin = (logits, func) if result._is_view() else None
    return _lazy(hidden, logits._weight, logits._bias, result, origin, shape or logits._shape)


def _cross_entropy(
    logits: LazyLogits, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    def bind(
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = IGNORE_INDEX,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor | None:
        if (
            weight is not None
            or size_average is not None
            or reduce is not None
            or logits.ndim != 2
            or target.dtype != torch.int64
            or target.shape != logits.shape[:1]
            or target.device != logits.device
        ):
            return None
        one = torch.zeros(1, dtype=logits.dtype, device=logits.device)
        dtype = F.cross_entropy(one[None], torch.zeros_like(one, dtype=torch.int64)).dtype  # autocast decides, too
        with torch.autocast(logits.device.type, enabled=False):
            hidden, weight, bias = logits._parts()
            if reduction == "none":
                hidden = computed(hidden)
            else:
                hidden, target = labelled(hidden, target, ignore_index)
            return ops.linear_cross_entropy(
                *(hidden, weight, bias, target),
                **logits._shape._asdict(),
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                reduction=reduction,
            ).to(dtype)

    return bind(*args, **kwargs)


_Rule = Callable[[LazyLogits, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Tensor | None]
_RULES: dict[Callable[..., Any], _Rule] = {
    Tensor.view: _same_rows,
    Tensor.reshape: _same_rows,
    torch.reshape: _same_rows,
    Tensor.flatten: _same_rows,
    torch.flatten: _same_rows,
    Tensor.__getitem__: _same_rows,
    Tensor.contiguous: _contiguous,
    Tensor.float: _cast,
    Tensor.to: _cast,
    Tensor.mul: _scale,
    Tensor.div: _scale,
    Tensor.tanh: _tanh,
    torch.tanh: _tanh,
    F.cross_entropy: _cross_entropy,
}

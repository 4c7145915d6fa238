"""Linear layers whose frozen weight is held in 8 bits: a byte and a share of a scale for each number."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.pytorch_utils import Conv1D

from fastln import ops
from fastln.errors import FastLNError
from fastln.ops import OpSettings
from fastln.ops.backends import implementation
from fastln.originals import ATTRIBUTE, Original, sampled
from fastln.processes import gathered
from fastln.standins.part import ClassChange, StandIn, form, own_parameter, stand_in
from fastln_kernels import reference_int8
from fastln_kernels.reference_int8 import Weight8

logger = logging.getLogger(__name__)

WEIGHT = "_fastln_int8"
_STATE = "_fastln_state8"  # of a parameter: its state when it was rounded, or when its sums were last checked


@dataclass(frozen=True)
class Int8Spec:
    """How a layer's weight is rounded.

    Attributes:
        turned: Whether blocks of 64 inner columns are turned by a Hadamard matrix first.
        keep: Whether the original weight is kept, for `restore`.
        twice: Whether what rounding leaves over is held in 8 bits more, for the forward product.
        name: The layer's name in the model, for errors.
    """

    turned: bool
    keep: bool = False
    twice: bool = False
    name: str = ""


@dataclass
class _Held:
    """What a layer has beside the whole numbers.

    Attributes:
        scale, row_sums, col_sums, turned: As in `fastln_kernels.reference_int8.Weight8`.
        transposed: Whether the module has its weight as `(n_inner, n_cols)`.
        dtype: The dtype of the original weight.
        kept: The original parameter, if it is kept.
        rest: The weight's second term, if it has one. It is no parameter: nothing shards it; `state_dict` has the sum.
        name: The layer's name in the model, for errors.
    """

    scale: Tensor
    row_sums: Tensor
    col_sums: Tensor
    turned: bool
    transposed: bool
    dtype: torch.dtype
    kept: nn.Parameter | None = None
    rest: Weight8 | None = None
    name: str = ""

    def of(self, values: Tensor) -> Weight8:
        """Return the 8-bit weight of a module that has these whole numbers.

        Raises:
            FastLNError: If they cannot be the ones that were made for it.
        """
        if self.transposed:
            values = values.t()
        if values.dtype != torch.int8 or values.shape != self.row_sums.shape + self.col_sums.shape:
            raise FastLNError(_changed(self.name))
        return Weight8(values, self.scale, self.turned, self.row_sums, self.col_sums)


class _Int8(StandIn):
    """A linear layer with its weight in 8 bits. The parameter `weight` keeps its name and shape."""

    weight: Tensor
    bias: Tensor | None

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the original weight, in which peft makes the layers that it puts beside this one."""
        _warn_unmergeable()
        held: _Held = self.__dict__[WEIGHT]
        return held.dtype

    def _compute(self, x: Tensor) -> Tensor:
        attributes = self.__dict__
        held: _Held = attributes[WEIGHT]
        bias = own_parameter(self, "bias")
        return ops.int8_linear(x, weight_of(self), bias, rest=held.rest, settings=attributes["_fastln"].settings)

    def tensors_beside(self) -> list[Tensor]:
        """Return the scales and sums, the second term, what is remembered of the original, and itself if it is kept."""
        held: _Held = self.__dict__[WEIGHT]
        parts = [held.scale, held.row_sums, held.col_sums, held.kept, *(held.rest or ())]
        parts += [original.samples for original in self.__dict__[ATTRIBUTE].values()]
        return [part for part in parts if isinstance(part, Tensor)]

    def check_originals(self) -> None:
        """Raise a `FastLNError` if the 8-bit weight is not the one that was made from the original."""
        held: _Held = self.__dict__[WEIGHT]
        for weight in filter(None, (weight_of(self), held.rest)):
            _check_sums(weight, held.name)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        unchanged = _is_unchanged(self.weight)
        module = super()._apply(fn, recurse)
        held: _Held = self.__dict__[WEIGHT]
        for name in ("scale", "row_sums", "col_sums"):  # they move with the weight, but no cast reaches them
            setattr(held, name, _moved(fn, getattr(held, name)))
        if held.rest is not None:
            values, scale, turned, *sums = held.rest
            held.rest = Weight8(_moved(fn, values), _moved(fn, scale), turned, *(_moved(fn, part) for part in sums))
        held.dtype = fn(torch.empty(0, dtype=held.dtype)).dtype
        _note_state(self.weight, unchanged)
        return module

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars:  # the parameters themselves
            return
        held: _Held = self.__dict__[WEIGHT]
        if held.kept is None:
            _warn_rounded()
        destination[f"{prefix}weight"] = dequantised(self) if held.kept is None else held.kept.detach()

    def _stands_for(self, given: Tensor) -> bool:
        """Whether a weight is the one that this module's own `state_dict` has in place of the original."""
        held: _Held = self.__dict__[WEIGHT]
        if held.kept is not None or self.weight.is_meta:
            return False
        own = _whole(_as_it_is(self), held)
        return given.dtype == own.dtype and torch.equal(given.to(own.device), own)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        given = state_dict.get(f"{prefix}weight")
        if given is None or given.shape != self.weight.shape or not given.is_floating_point():
            return super()._load_from_state_dict(state_dict, prefix, *args)
        held: _Held = self.__dict__[WEIGHT]
        whole = gathered(given)  # FSDP's are rounded whole, as all that is held beside the whole numbers is
        if not self._stands_for(whole):  # else it stays what it is: the base's, rounded once
            device = whole.device if self.weight.is_meta else self.weight.device
            spec = Int8Spec(held.turned, held.kept is not None, held.rest is not None, held.name)
            like = given if self.weight.is_meta else self.weight
            put(self, whole.to(device, held.dtype), spec)
            if isinstance(like, DTensor):
                values = nn.Parameter(_laid_out_like(like, self.weight.detach()), requires_grad=False)
                _note_state(values)
                self._parameters["weight"] = values
        others = {key: value for key, value in state_dict.items() if key != f"{prefix}weight"}
        others[f"{prefix}weight"] = self.weight.detach()
        return super()._load_from_state_dict(others, prefix, *args)


@form
class Int8Linear(_Int8):
    """`torch.nn.Linear` with a frozen weight in 8 bits, computed by `fastln.ops.int8_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return what the stock module returns for `input` (..., in_features), up to the rounding to 8 bits."""
        return self._compute(input)


@form
class Int8Conv1D(_Int8):
    """GPT-2's linear layer with a frozen weight (in_features, out_features) in 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what the stock module returns for `x` (..., in_features), up to the rounding to 8 bits."""
        return self._compute(x)


def weight_of(module: nn.Module) -> Weight8:
    """Return the 8-bit weight of a stand-in.

    Raises:
        FastLNError: If someone has written to it since it was rounded, or put another in its place.
    """
    held: _Held = module.__dict__[WEIGHT]
    values = own_parameter(module, "weight")
    made = held.of(values)
    if not torch.compiler.is_compiling() and not _is_unchanged(values):
        _check_sums(made, held.name)
        _note_state(values)
    return made


def _as_it_is(module: nn.Module) -> Weight8:
    values = module.weight
    assert isinstance(values, Tensor)
    held: _Held = module.__dict__[WEIGHT]
    return held.of(values)


def _is_unchanged(values: Tensor) -> bool:
    """Whether a weight has not been written to since it was rounded or checked. Copies of it are yet to be checked."""
    return values.is_inference() or getattr(values, _STATE, None) == _state(values)


def _note_state(values: Tensor, unchanged: bool = True) -> None:
    setattr(values, _STATE, _state(values) if unchanged else None)


def _state(values: Tensor) -> tuple[int, int] | None:
    """Return what changes as a tensor is written to, or gets other memory by `values.data = ...`."""
    if values.is_inference():  # such as code that moves a model may make; it counts no versions
        return None
    plain = type(values) in (nn.Parameter, Tensor)
    return values._version, values.untyped_storage()._cdata if plain else 0


def dequantised(module: nn.Module) -> Tensor:
    """Return the weight that a stand-in's 8-bit weight stands for, in the original's shape and dtype."""
    whole = _whole(weight_of(module), module.__dict__[WEIGHT])
    return _laid_out_like(module.weight, whole) if isinstance(module.weight, DTensor) else whole


def _laid_out_like(other: DTensor, whole: Tensor) -> DTensor:
    return distribute_tensor(whole, other.device_mesh, other.placements)


def _moved(fn: Any, tensor: Tensor) -> Tensor:
    """Move a tensor as `Module.to` and the like do. Casts change floats alone, so it goes as whole numbers."""
    moved: Tensor = fn(tensor.view(torch.int32) if tensor.is_floating_point() else tensor)
    return moved.view(tensor.dtype)


def _whole(given: Weight8, held: _Held) -> Tensor:
    """Return what an 8-bit weight stands for, whole. If it is distributed, all processes must call this."""
    weight = reference_int8.dequantise_weight(given._replace(values=gathered(given.values)), held.rest)
    return (weight.t() if held.transposed else weight).contiguous().to(held.dtype)


@torch.inference_mode(False)  # tensors that are made under it cannot be checked for changes
def put(module: nn.Module, weight: Tensor, spec: Int8Spec, *, settings: OpSettings | None = None) -> None:
    """Round a weight and put it into a module, as a frozen parameter in 8 bits.

    Args:
        module: The module; it becomes a stand-in before or after this.
        weight: The original weight, in the module's own layout.
        spec: How to round it, and whether to keep the original: itself if it is a parameter, else a copy.
        settings: Which backend rounds; the module's own by default.
    """
    transposed = isinstance(module, Conv1D)
    detached = weight.detach()
    laid_out = detached.t() if transposed else detached
    kernels = implementation("int8_linear", detached, settings or module.__dict__["_fastln"].settings)
    rounds = getattr(kernels, "quantise_weight", reference_int8.quantise_weight)
    if detached.is_meta:
        rounds = reference_int8.quantise_weight
    made: Weight8 = rounds(laid_out, turned=spec.turned)
    rest = None
    if spec.twice:
        rest = reference_int8.second_term(laid_out, made, rounds)
    values = nn.Parameter(made.values.t() if transposed else made.values, requires_grad=False)
    kept = None
    if spec.keep:
        kept = weight if isinstance(weight, nn.Parameter) else nn.Parameter(detached.clone(), requires_grad=False)
    sums = made.row_sums, made.col_sums
    module.__dict__[WEIGHT] = _Held(made.scale, *sums, spec.turned, transposed, weight.dtype, kept, rest, spec.name)
    samples = sampled(detached.reshape(-1)).clone()
    module.__dict__[ATTRIBUTE] = {"weight": Original(samples, weight.dtype)}
    _note_state(values)
    module._parameters["weight"] = values


def _check_sums(weight: Weight8, name: str) -> None:
    """Raise a `FastLNError` if the whole numbers of a weight do not have the sums that they had when it was made."""
    values = gathered(weight.values)
    if values.is_meta:
        return
    row_sums, col_sums = reference_int8.sums_of(values)
    if not (torch.equal(row_sums, weight.row_sums) and torch.equal(col_sums, weight.col_sums)):
        raise FastLNError(_changed(name))


def _changed(name: str) -> str:
    return (
        f"the 8-bit weight of the frozen layer {name!r} was changed after fastln.prepare(), so it is no longer the "
        "base's: change weights before you prepare a model, or load them with load_state_dict(); layers of LoRA cannot "
        "be merged into it"
    )


_told: set[str] = set()


def _warn_rounded() -> None:
    if "state" not in _told:
        _told.add("state")
        logger.warning(
            "state_dict() of a model with products='int8' has weights that were rounded to 8 bits: they are close to "
            "the original ones, not equal (fastln.save_adapter() stores only what trains; keep_weights=True keeps them)"
        )


def _warn_unmergeable() -> None:
    if "peft" not in _told:
        _told.add("peft")
        logger.warning(
            "layers that peft puts beside weights in 8 bits cannot become part of these: merge_and_unload() and "
            "merge_adapter() of peft fail, or round away what was learned (safe_merge=True); save the adapter, and "
            "merge it into the base"
        )


@contextmanager
def merges_are_refused() -> Iterator[None]:
    """While peft puts layers into a model that refuse to be merged, say nothing about that beforehand."""
    was_told = "peft" in _told
    _told.add("peft")
    try:
        yield
    finally:
        if not was_told:
            _told.remove("peft")


@dataclass
class Int8Weight:
    """Replaces a module's weight by its 8-bit form; puts the original back where it was kept.

    Attributes:
        module: The module.
        original: The weight; dropped by `settle` unless it is kept.
    """

    module: nn.Module
    original: nn.Parameter | None

    def put(self, spec: Int8Spec, form: type[StandIn], settings: OpSettings) -> None:
        """Round the weight, and make the module a stand-in."""
        assert self.original is not None
        put(self.module, self.original, spec, settings=settings)
        stand_in(self.module, form, settings)

    def settle(self) -> None:
        """Forget the original weight, unless it is kept."""
        if self.module.__dict__[WEIGHT].kept is None:
            self.original = None

    @property
    def is_lost(self) -> bool:
        """Whether the original weight is gone, so that it cannot be put back."""
        return self.original is None

    def remove(self) -> None:
        """Put the original weight back."""
        if WEIGHT not in self.module.__dict__:
            return
        kept = self.module.__dict__[WEIGHT].kept
        original = self.original if kept is None else kept
        assert original is not None  # `restore` has checked it
        held: _Held = self.module.__dict__[WEIGHT]
        original.data = original.data.to(held.scale.device, held.dtype)
        self.module._parameters["weight"] = original
        for name in (WEIGHT, ATTRIBUTE):
            self.module.__dict__.pop(name, None)
        ClassChange(self.module).remove()

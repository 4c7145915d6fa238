"""Tensors that the backward makes again instead of keeping them.

Queries, keys, values and the hidden rows of an MLP are products of a norm's result with frozen weights. The norm keeps
its rows for its own backward, and the weights exist anyway. So an operation that needs such a tensor may drop it, and
have it made again in the backward, with the same code: the norm's result from its rows, and the product of that.

The operation finds out in its forward, from autograd's graph: the node that made the tensor's memory must be one that
says how it makes its result again (`makes_again`), and so must be the nodes before it, down to a norm that keeps its
rows. A tensor of another origin is kept. Nodes come before the operation's own in the graph, so what they keep still
exists when its backward runs, and no tensor is kept twice.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastln.errors import FastLNError

logger = logging.getLogger(__name__)

MOST_PRODUCTS = 1
"""How many products one after another may be made again for one tensor. With more, their cost would have no bound."""

Memo = dict[int, Tensor]
"""The results that were made again in one call, by the `id` of their nodes."""

_PARTS_OF_CHECKPOINTS = ("_checkpoint_hook", "_recomputation_hook")


class _Recipe(NamedTuple):
    """How a node makes its result again.

    Attributes:
        run: Takes the node and the memo; returns the result.
        n_products: The products that it takes, one after another.
        reads: What it reads besides what autograd keeps for it and checks, with the versions of the forward.
    """

    run: Callable[[Any, Memo], Tensor]
    n_products: int
    reads: tuple[tuple[Tensor, int | None], ...]

    def check(self) -> None:
        """Raise a `FastLNError` if a tensor that the node reads was written to since the forward."""
        for tensor, version in self.reads:
            if version != _version(tensor):
                raise FastLNError(
                    f"a parameter of shape {(*tensor.shape,)} was changed between forward and backward, which makes a "
                    "result with it again: run backward before the optimizer's step"
                )


class Source(NamedTuple):
    """How a tensor is made again: as a view of the result of a node.

    Attributes:
        node: The node.
        size: The shape of the tensor.
        stride: Its strides.
        offset: Its offset in the memory of the result.
        n_bytes: The size of that memory.
        n_products: The products that it takes, one after another.
    """

    node: Any
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt
    n_bytes: int | torch.SymInt
    n_products: int

    def make(self, memo: Memo) -> Tensor:
        """Return the tensor."""
        whole = memo.get(id(self.node))
        if whole is None:
            recipe: _Recipe = self.node.recipe
            recipe.check()
            whole = memo[id(self.node)] = recipe.run(self.node, memo)
        assert whole.untyped_storage().nbytes() == self.n_bytes, "a result was made again with another layout"
        return whole.as_strided(self.size, self.stride, self.offset)


def source_of(x: Tensor | None, most_products: int = MOST_PRODUCTS) -> Source | None:
    """Return how the backward can make a tensor again; None if it must be kept.

    Inside checkpoints all tensors are kept, because these make everything again anyway.

    Args:
        x: The tensor.
        most_products: How many products one after another that may take.
    """
    if torch.compiler.is_compiling():
        _say_who_decides()
        return None
    if x is None or type(x) not in (Tensor, nn.Parameter):
        return None
    made = x if x._base is None or hasattr(x.grad_fn, "recipe") else x._base
    recipe: _Recipe | None = getattr(made.grad_fn, "recipe", None)
    if recipe is None or recipe.n_products > most_products or made.output_nr or made._version or x.dtype != made.dtype:
        return None
    if _is_checkpointed():
        return None
    n_bytes = x.untyped_storage().nbytes()
    return Source(made.grad_fn, x.size(), x.stride(), x.storage_offset(), n_bytes, recipe.n_products)


@torch.compiler.assume_constant_result  # so it is called while code is compiled, and is no part of that code
def _say_who_decides() -> None:
    _say()


@functools.cache
def _say() -> None:
    logger.warning(
        "torch.compile: the compiler decides itself what its code keeps and what it makes again, so in compiled code "
        "activations='again' and 'recompute' keep what 'exact' does; 'compressed' and 'checkpoint' work there"
    )


def sources_of(tensors: Sequence[Tensor | None], wanted: bool) -> tuple[list[Source | None], list[Tensor | None]]:
    """Return how the backward makes tensors again, and those of them that must be kept; `make` puts both together.

    Args:
        tensors: The tensors.
        wanted: Whether any is to be made again.
    """
    sources = [source_of(x) if wanted else None for x in tensors]
    return sources, [x if source is None else None for x, source in zip(tensors, sources, strict=True)]


def makes_again(
    ctx: Any,
    run: Callable[[Any, Memo], Tensor],
    *sources: Source,
    n_products: int = 0,
    reads: tuple[Tensor | None, ...] = (),
) -> None:
    """Note in a node that it can make its first result again.

    Args:
        ctx: The context of the operation, which is its node.
        run: Makes the result: takes the node and the memo.
        sources: What it makes again first.
        n_products: The products that it takes besides.
        reads: The parameters that `run` reads without `save_for_backward`: they exist anyway, but may be written to.
    """
    if _is_checkpointed():  # what the node keeps can be read once there, by its own backward
        return
    n_products += max([source.n_products for source in sources], default=0)
    ctx.recipe = _Recipe(run, n_products, tuple([(x, _version(x)) for x in reads if x is not None]))


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


def make(tensors: Sequence[Tensor | None], sources: Sequence[Source | None]) -> list[Tensor | None]:
    """Return the tensors of an operation, those with a source made again. What two of them share is made once."""
    if not any(sources):
        return list(tensors)
    memo: Memo = {}
    with _as_in_the_forward():
        return [x if source is None else source.make(memo) for x, source in zip(tensors, sources, strict=True)]


def without(*tensors: Tensor) -> AbstractContextManager[object]:
    """Keep none of these for the backward of torch's own operations, where they can be made again.

    Args:
        tensors: What the operations inside take. Autograd drops whatever it would keep of their memory.
    """
    sources = [source_of(x) for x in tensors]
    wanted = {_place(x): source for x, source in zip(tensors, sources, strict=True) if source is not None}
    if not wanted:
        return nullcontext()
    memo: Memo = {}
    n_dropped = n_made = 0

    def pack(x: Tensor) -> Tensor | Source:
        nonlocal n_dropped
        source = wanted.get(_place(x))
        n_dropped += source is not None
        return x.detach() if source is None else source

    def unpack(kept: Tensor | Source) -> Tensor:
        nonlocal n_made
        if isinstance(kept, Tensor):
            return kept
        n_made += 1
        with _as_in_the_forward():
            made = kept.make(memo)
        if n_made % n_dropped == 0:
            memo.clear()
        return made

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


@contextmanager
def _as_in_the_forward() -> Iterator[None]:
    """Without autograd, and without autocast: tensors are in the dtypes that it gave them, or had none around them."""
    with ExitStack() as off:
        off.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                off.enter_context(torch.autocast(device, enabled=False))
        yield


def _place(x: Tensor) -> tuple[Any, ...]:
    """Return what tells a tensor from others that are alive: its memory, on any device, and its place in it."""
    return x.untyped_storage()._cdata, x.storage_offset(), x.size(), x.stride()


def check_weight(weight: Tensor) -> None:
    """Check that a weight is there.

    Raises:
        FastLNError: If it is not: FSDP has freed it since the forward.
    """
    if weight.numel() and not weight.is_meta and not weight.untyped_storage().nbytes():
        raise FastLNError(
            "a frozen weight, with which the backward wants to make a layer's result again, was freed after the "
            "forward: shard whole blocks (fully_shard(block)), not single layers, or use activations='exact'"
        )


def _is_checkpointed() -> bool:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith(_PARTS_OF_CHECKPOINTS)

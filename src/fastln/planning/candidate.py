"""One way to train a model: set up on meta as a run would set it up, and asked for its memory and its work."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastln.engines import put
from fastln.errors import FastLNError
from fastln.families.heads import find_heads
from fastln.methods import count_parameters
from fastln.models.example import USUAL, BatchSize, Example, example, resized
from fastln.models.outline import outline
from fastln.models.shapes import is_shape, parse_shape
from fastln.ops.rounded import forget_rows
from fastln.ops.settings import STORAGES
from fastln.peak import StepMemory, step_memory
from fastln.plan import apply, plan
from fastln.settings import MethodSettings
from fastln.step_time import Call, Work, step_memory_and_work

OFFLOAD = "offload"
"""What `Storage.block` says where a block's tensors go to the host."""

# QLoRA (arXiv 2305.14314): 4 bits a number, and with double quantisation 0.127 bits more for the scales of 64 numbers.
NF4_BITS = 4.127


@dataclass
class Candidate:
    """A model, a method, and how its operations run.

    Attributes:
        spec: The model, as `fastln.models.outline` takes it.
        settings: The method and how operations run.
        dtype: The model's dtype.
        kind: Where it would run: "cpu" or "cuda".
        four_bits: Whether the frozen linear layers of the base have 4 bits, as QLoRA's: by arithmetic.
        checkpoints: Whether transformers' own gradient checkpointing is on, for stock models.
    """

    spec: str
    settings: MethodSettings
    dtype: str = "bfloat16"
    kind: str = "cpu"
    four_bits: bool = False
    checkpoints: bool = False
    _made: tuple[str, nn.Module, PreTrainedModel] | None = field(default=None, repr=False)

    def batch(self, size: BatchSize = USUAL) -> Example:
        """Return a batch of this size.

        Raises:
            FastLNError: As in `fastln.models.example`.
        """
        spec = resized(self.spec, size)
        made = example(self._model(spec)[1], size, spec)
        dtype = getattr(torch, self.dtype)
        floats = {
            name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in made.arguments.items()
        }
        return replace(made, arguments=floats)

    def memory(self, size: BatchSize = USUAL) -> StepMemory:
        """Predict the memory of a step.

        Raises:
            FastLNError: If there is no such step.
        """
        trained, batch = self._step(size)
        return self._in_four_bits(step_memory(trained, batch), size)

    def memory_and_work(self, size: BatchSize = USUAL) -> tuple[StepMemory, Work]:
        """Predict the memory of a step, and count what it does.

        Raises:
            FastLNError: If there is no such step.
        """
        memory, done = step_memory_and_work(*self._step(size))
        if self.four_bits:
            # Forward and backward each read 4 bits of every number, and write it in the model's dtype.
            layers = _frozen_linears(self._model(resized(self.spec, size))[1])
            moved = sum(layer.weight.numel() * NF4_BITS / 8 + layer.weight.nbytes for layer in layers)
            done = done.plus(Call("other", "", 0.0, 2.0 * moved))
        return self._in_four_bits(memory, size), done

    def _step(self, size: BatchSize) -> tuple[nn.Module, dict[str, Any]]:
        return self._model(resized(self.spec, size))[0], dict(self.batch(size).arguments)

    def _in_four_bits(self, found: StepMemory, size: BatchSize) -> StepMemory:
        if not self.four_bits:
            return found
        layers = _frozen_linears(self._model(resized(self.spec, size))[1])
        lost = sum(layer.weight.nbytes - round(layer.weight.numel() * NF4_BITS / 8) for layer in layers)
        # The layer that runs needs its weight in the model's dtype, for the length of one product.
        largest = max((layer.weight.nbytes for layer in layers), default=0)
        return replace(found, weights=found.weights - lost, workspace=found.workspace + largest)

    def counts(self) -> tuple[int, int]:
        """Return the numbers of trained parameters and of all."""
        return count_parameters(self._model(resized(self.spec, USUAL))[0])

    def settled(self, size: BatchSize) -> BatchSize:
        """Return a size with what it leaves open."""
        return size.settled(self.spec)

    def _model(self, spec: str) -> tuple[nn.Module, PreTrainedModel]:
        """Return the module to train and the model in it; a shape's positions need a model for each size."""
        key = spec if not is_shape(spec) else f"{parse_shape(spec).family}:{parse_shape(spec).size}"
        if self._made is None or self._made[0] != key:
            base = outline(spec).to(getattr(torch, self.dtype)).train()
            self._made = (key, self._put(base), base)
        return self._made[1:]

    def _put(self, base: PreTrainedModel) -> nn.Module:
        if STORAGES[self.settings.activations].block == OFFLOAD:
            raise FastLNError(
                "activations 'offload' cannot be planned: what a block keeps goes to the host's memory, which the meta "
                "device does not have; plan 'checkpoint' or 'recompute'"
            )
        forget_rows()
        with _quietly():
            if self.checkpoints:
                base.gradient_checkpointing_enable({"use_reentrant": False})
                if getattr(base, "_require_grads_hooks", None):  # for reentrant checkpoints; some models fail with them
                    base.disable_input_require_grads()
            if self.settings.engine == "fastln" and self.settings.method not in ("lora", "layernorm+lora"):
                apply(plan(base, **self.settings.of_plan, device=self.kind), base)
                return base
            return put(base, self.settings, quietly=True)


def _frozen_linears(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers that QLoRA rounds: all that are frozen, but the language-model head."""
    heads = {id(head) for head in find_heads(model).values()}
    found = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in heads}
    return [layer for layer in found.values() if not layer.weight.requires_grad]


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the log of set-ups that only a plan makes out of the way."""
    logger = logging.getLogger("fastln")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)

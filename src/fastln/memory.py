"""The memory of a training step: counted while a model runs (on a CPU, a GPU or the meta device), or measured.

All reports use the same terms. *Weights* are a model's parameters and buffers, and what stand-ins hold beside them:
with 8-bit products scales and sums, second terms, originals that are kept, and the head's 8-bit copy. *Gradients*
are those of the trained parameters. *Optimizer* is what the optimizer keeps for them. *Saved* is what autograd keeps
from forward to backward.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fastln.errors import FastLNError
from fastln.ops.rounded import bytes_at_hand, forget_rows
from fastln.standins.part import StandIn
from fastln_kernels.cpu import memory as allocator
from fastln_kernels.cpu.library import KernelsUnavailableError

MOMENTS = 8  # bytes for each trained number: AdamW's two moments, in float32
MASTER = 4  # bytes for each trained number of lower precision: its float32 copy


@dataclass(frozen=True)
class Footprint:
    """The memory of a training step, in bytes, without libraries and intermediate results.

    Attributes:
        weights: Parameters and buffers, and what stand-ins hold beside them.
        gradients: Gradients of the trained parameters.
        optimizer: What the optimizer keeps for them.
        saved: What autograd keeps for backward.
    """

    weights: int
    gradients: int
    optimizer: int
    saved: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.saved

    def describe(self, saved: str = "stored for backward") -> str:
        """Format the sizes as one line, in MiB.

        Args:
            saved: The label of `saved`, for example with the batch that it was counted for.
        """
        parts = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer, saved: self.saved}
        listed = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in parts.items())
        return f"{self.total / 2**20:,.1f} MiB: {listed}"


def footprint(model: nn.Module, saved: int) -> Footprint:
    """Return the memory of an AdamW step as `fastln.training` runs it, with moments and copies in float32.

    Args:
        model: On any device, including meta. The trained parameters are those that require a gradient.
        saved: Bytes that autograd keeps for backward, as `SavedActivations` counts them.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Footprint(
        weights=sum(tensor.nbytes for tensor in held_by(model)),
        gradients=sum(parameter.nbytes for parameter in trained),
        optimizer=sum(
            parameter.numel() * (MOMENTS + MASTER * (parameter.dtype != torch.float32)) for parameter in trained
        ),
        saved=saved,
    )


def held_by(model: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that a model holds from step to step."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, StandIn):
            yield from module.tensors_beside()


class SavedActivations:
    """Counts the bytes that autograd keeps for backward while the context is open.

    Open it only around the forward pass: what a recomputing layer saves again during backward is not kept between the
    two. Each storage counts once and in full, however many views of it are saved, because any view keeps all of it
    alive. The storages of the model's own parameters and buffers, and of what lies beside them, do not count, because
    they exist anyway. Rows in 8 bits that the last layer left at hand count: they live until its input is freed.

        with SavedActivations(model) as saved:
            loss = model(**batch).loss
        loss.backward()
        print(saved.bytes)

    The model and its batch may be on the meta device. Then `AsOnCPU` is active, and the count is that of the same model
    on a CPU, with these exceptions:

    - Logits and the last block's rows are not late, because `fastln.late` needs to know which positions have a label.
      So a prepared model counts them in full, as with `without=("late_logits", "late_rows")` on a CPU.
    - torch's own LayerNorm in 16 bits counts its statistics in float32, as on a GPU. A CPU keeps them in 16 bits.
    - No token counts as padding, so the count lacks the mask that a CPU would keep for a padded batch.
    - Rows in 8 bits at hand do not count: at most the input of one layer, at a byte a number.
    - A model whose shapes depend on values, such as Qwen2.5-VL, cannot run on meta: torch raises its own error.

    Args:
        model: The model whose parameters and buffers do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        own = list(held_by(model))
        self._excluded = {_storage(tensor) for tensor in own}
        self._sizes: dict[StorageWeakRef, int] = {}
        self._at_hand = 0
        self._is_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        # The unpack hook outlives the context: backward calls it.
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._open = ExitStack()

    @property
    def bytes(self) -> int:
        """The bytes saved so far."""
        return sum(self._sizes.values()) + self._at_hand

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self._excluded:
            self._sizes[storage] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # an undetached result would form a cycle with its own node, and never be freed

    def __enter__(self) -> SavedActivations:
        forget_rows()  # other models'
        if self._is_meta:
            self._open.enter_context(AsOnCPU())
        self._open.enter_context(self._hooks)
        return self

    def __exit__(self, *exception: object) -> None:
        self._at_hand = bytes_at_hand()
        self._open.close()


def _storage(tensor: Tensor) -> StorageWeakRef:
    """Return a key that identifies a tensor's storage, even if another one gets its address after it is freed.

    On the meta device every storage has the address 0. A weak reference keeps no memory alive.
    """
    return StorageWeakRef(tensor.untyped_storage())


class AsOnCPU(TorchFunctionMode):
    """Makes a model on the meta device run as on a CPU, although its tensors have no values.

    Attention: on the meta device, torch's own attention forms the scores and keeps them. Here it uses the blockwise
    operator wherever a CPU would.

    Tests of values: `if mask.all():` fails on the meta device. Here such a test is true, which is the usual case in
    transformers: no token is padding, the texts of a batch are not packed, there are as many image tokens as patches.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or its replacement on the meta device."""
        if func is functional.scaled_dot_product_attention and args[0].is_meta:
            return _attention(*args, **(kwargs or {}))
        if func in _QUESTIONS and args[0].is_meta and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))


_QUESTIONS = (Tensor.__bool__, Tensor.item)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute `torch.nn.functional.scaled_dot_product_attention` with the operator that a CPU uses."""
    in_blocks = dropout_p == 0 and query.ndim == 4 and not (attn_mask is not None and attn_mask.requires_grad)
    if not in_blocks:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)  # the CPU's operator gets such a mask, and keeps it
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = operator(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return out


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> str:
    """Start a new measurement of the peak memory of `device` (of this process, for the CPU).

    Returns:
        The name of what `peak_bytes` will return: "CUDA allocator peak"; or "process peak RSS", which is everything
        resident (libraries, weights, activations); or "process peak RSS, whole life" if the system cannot reset that.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return "CUDA allocator peak"
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5 resets VmHWM to what is resident now
    except OSError:
        return "process peak RSS, whole life"
    return "process peak RSS"


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory since `reset_peak`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class AllocatorPeak:
    """Measures the most memory that torch's CPU allocator had handed out at once, in the whole process.

    It measures tensors and torch's own buffers, to the byte (rounded up by at most a page each), where `peak_bytes`
    measures all that is resident. Tensors that exist before the context do not count, so it opens before the model is
    made; nor do files that are mapped into memory. There is one peak in a process: open one context at a time.

        with AllocatorPeak() as allocated:
            model, batch = ...
            model(**batch).loss.backward()
        print(allocated.bytes)
    """

    kind = "CPU allocator peak"
    """What is measured, in the words of `reset_peak`."""

    def __init__(self) -> None:
        self._bytes: int | None = None

    def __enter__(self) -> AllocatorPeak:
        try:
            allocator.start_counting()
        except KernelsUnavailableError as error:
            raise FastLNError(f"what torch allocates on the CPU cannot be counted: {error}") from None
        self._bytes = None
        self.reset()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bytes = self.bytes
        allocator.stop_counting()

    def reset(self) -> None:
        """Begin again with what is allocated now."""
        allocator.reset_peak()

    @property
    def live(self) -> int:
        """Bytes that are allocated now."""
        return allocator.live_bytes()

    @property
    def bytes(self) -> int:
        """The most since the context opened or since `reset`; after the context, as it was at its end."""
        return allocator.peak_bytes() if self._bytes is None else self._bytes

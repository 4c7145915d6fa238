"""What a training step holds in memory: counted while a model runs, on a CPU, a GPU or the meta device, or measured.

The words are the same everywhere. *Weights* are a model's parameters and buffers, *gradients* those of the parameters
that train, *optimizer* what the optimizer keeps for them, and *saved* what autograd keeps from forward to backward.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.overrides import TorchFunctionMode

MOMENTS = 8  # bytes for each trained number: AdamW's two moments, in float32
MASTER = 4  # bytes for each trained number of lower precision: its float32 copy


@dataclass(frozen=True)
class Footprint:
    """What a training step holds in memory, in bytes. Libraries and intermediate results come on top.

    Attributes:
        weights: Of parameters and buffers.
        gradients: Of the parameters that train.
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
        """Return it as one line, in MiB.

        Args:
            saved: What to call `saved`, for example by what batch it was counted.
        """
        parts = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer, saved: self.saved}
        listed = ", ".join(f"{name} {size / 2**20:,.1f}" for name, size in parts.items())
        return f"{self.total / 2**20:,.1f} MiB: {listed}"


def footprint(model: nn.Module, saved: int) -> Footprint:
    """Return what a step of AdamW holds, as `fastln.training` sets it up: moments and copies in float32.

    Args:
        model: On any device, the meta device included. What trains is what requires a gradient.
        saved: Bytes that autograd keeps for backward, as `SavedActivations` counts them.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Footprint(
        weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        gradients=sum(parameter.nbytes for parameter in trained),
        optimizer=sum(
            parameter.numel() * (MOMENTS + MASTER * (parameter.dtype != torch.float32)) for parameter in trained
        ),
        saved=saved,
    )


class SavedActivations:
    """Counts the bytes that autograd keeps for backward while the context is open.

    Open it around the forward pass alone: what a recomputing layer saves again during backward is not kept between the
    two. Every storage counts once and whole, however many views of it are saved, because any view keeps all of it
    alive. The storages of the model's own parameters and buffers do not count, because they would be there anyway.

        with SavedActivations(model) as saved:
            loss = model(**batch).loss
        loss.backward()
        print(saved.bytes)

    The model may lie on the meta device, with its batch. Then `AsOnCPU` is on, and the count is that of the same model
    on a CPU, except that

    - logits and the last block's rows do not wait there, because `fastln.late` needs to know which positions have a
      label. So a prepared model counts them whole, as with `without=("late_logits", "late_rows")` on a CPU;
    - torch's own LayerNorm in 16 bits counts its statistics in float32, as a GPU keeps them, and a CPU does in 16 bits;
    - no token counts as padding, so no mask is kept that a CPU would keep for a padded batch;
    - a model whose shapes depend on values, such as Qwen2.5-VL, cannot run there: torch raises its own error.

    Args:
        model: Its parameters and buffers are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        own = [*model.parameters(), *model.buffers()]
        self._excluded = {_storage(tensor) for tensor in own}
        self._sizes: dict[StorageWeakRef, int] = {}
        self._is_meta = any(tensor.is_meta for tensor in own)
        # The unpack hook outlives the context: backward calls it.
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._open = ExitStack()

    @property
    def bytes(self) -> int:
        """What was saved so far, in bytes."""
        return sum(self._sizes.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self._excluded:
            self._sizes[storage] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # a result packed as it is would hold the node that holds it, for ever

    def __enter__(self) -> SavedActivations:
        if self._is_meta:
            self._open.enter_context(AsOnCPU())
        self._open.enter_context(self._hooks)
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()


def _storage(tensor: Tensor) -> StorageWeakRef:
    """Return what tells a tensor's storage from all others, those included that get its address after it is freed.

    On the meta device every storage has the address 0. A weak reference keeps no memory.
    """
    return StorageWeakRef(tensor.untyped_storage())


class AsOnCPU(TorchFunctionMode):
    """Has a model on the meta device do what it does on a CPU, although no tensor has values there.

    Attention: on the meta device torch's own forms the scores, and keeps them. Here it takes the operator in blocks
    that a CPU takes, wherever a CPU would.

    Questions about values: `if mask.all():` fails on the meta device. Here the answer is yes, which transformers' own
    questions hope for: no token is padding, the texts of a batch are not packed, there are as many image tokens as
    patches.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, or what takes its place on the meta device."""
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
    """As `torch.nn.functional.scaled_dot_product_attention`, by the operator that a CPU takes."""
    in_blocks = dropout_p == 0 and query.ndim == 4 and not (attn_mask is not None and attn_mask.requires_grad)
    if not in_blocks:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)  # what a CPU's operator is given, and keeps
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
        What `peak_bytes` will return: "CUDA allocator peak"; or "process peak RSS", which is everything resident
        (libraries, weights, activations); or, where the system cannot reset that, "process peak RSS, whole life".
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return "CUDA allocator peak"
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: VmHWM falls back to what is resident now
    except OSError:
        return "process peak RSS, whole life"
    return "process peak RSS"


def peak_bytes(device: torch.device) -> int:
    """The peak memory since `reset_peak`, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

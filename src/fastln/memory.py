"""What a step stores: the tensors that autograd keeps for backward, and the peak memory of a process or a GPU."""

import resource
import sys
from pathlib import Path

import torch
from torch import nn


class SavedActivations:
    """Counts the bytes that autograd keeps for backward while the context is open.

    Open it around the forward pass alone: what a recomputing layer saves again during backward is not stored between
    the two. Every storage counts once and whole, however many views of it are saved, since any view keeps all of it
    alive; the storages of the model's own parameters and buffers do not count, since they would be there anyway.

        with SavedActivations(model) as saved:
            loss = model(**batch).loss
        loss.backward()
        print(saved.bytes)

    Args:
        model: Its parameters and buffers are left out.
    """

    def __init__(self, model: nn.Module):
        self._excluded = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._sizes: dict[tuple[torch.device, int], int] = {}
        # The unpack hook outlives the context: backward calls it.
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """What was saved so far, in bytes."""
        return sum(self._sizes.values())

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        address = _address(tensor)
        if address not in self._excluded:
            self._sizes[address] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # a result packed as it is would hold the node that holds it, for ever

    def __enter__(self) -> "SavedActivations":
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)


def _address(tensor: torch.Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> str:
    """Start a new measurement of the peak memory of `device` (of this process, for the CPU).

    Returns:
        What `peak_bytes` will tell: "CUDA allocator peak", or "process peak RSS" (everything that is resident:
        libraries, weights, activations), or that of the process's whole life where it cannot be started anew.
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

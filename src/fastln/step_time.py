"""Predicts the time of a training step: what it does, counted on meta, and how long a device takes for that.

    seconds = products / (rate * efficiency) + bytes of all other operations / (bandwidth * share)
              + calls * seconds per call

The step runs once, forward and backward, as `prepare` or an engine set the model up. Each call below Python is noted:
its matrix products, the bytes that it reads and writes, and that it is a call. So whatever a storage mode makes again
counts, because it runs again. Rates and bandwidth are the device's. The other coefficients are `Costs`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from fastln.devices import THIS_CPU, Device, find_device
from fastln.errors import FastLNError
from fastln.machine import cpu_model, memory_limit
from fastln.memory import AsOnCPU
from fastln.ops.linear_cross_entropy import IGNORE_INDEX
from fastln.ops.rounded import forget_rows
from fastln.peak import StepMemory, loss_of, run_backward, step_memory, without_gradients
from fastln.rates import floor_rate, has_bfloat16_units, int8_product_rate
from fastln.state import prepared
from fastln_kernels.cpu import units

OPTIMIZER_BYTES = 28
"""Bytes that AdamW moves for each trained number, in float32: it reads value, gradient and both moments, and writes
value and moments."""
MASTER_BYTES = 6
"""Bytes that it moves besides where the number has 16 bits: it reads a 16-bit gradient and writes a 16-bit value, and
the float32 gradient that is made in between costs as much as the one that it replaces."""


class Call(NamedTuple):
    """One call of an operation.

    Attributes:
        kind: "linear", "attention" or "int8" for matrix products; "other" for all else.
        dtype: The dtype of the factors of a product; empty for others.
        operations: Multiplications and additions of its products.
        n_bytes: What it reads and writes.
    """

    kind: str
    dtype: str
    operations: float
    n_bytes: float


@dataclass(frozen=True)
class Work:
    """What a training step does.

    Attributes:
        calls: How often each call is made.
    """

    calls: Mapping[Call, int]

    @property
    def operations(self) -> float:
        """Multiplications and additions of all products."""
        return sum(call.operations * n for call, n in self.calls.items())

    @property
    def n_bytes(self) -> float:
        """Bytes that all calls but products read and write."""
        return sum(call.n_bytes * n for call, n in self.calls.items() if call.kind == "other")

    @property
    def n_calls(self) -> int:
        """All calls."""
        return sum(self.calls.values())

    def plus(self, *more: Call) -> Work:
        """Return the work with further calls."""
        calls = Counter(self.calls)
        calls.update(more)
        return Work(calls)


@dataclass(frozen=True)
class Costs:
    """How much of a device's rates a step reaches.

    Attributes:
        efficiency: The share of its rate that each kind of product reaches.
        bandwidth: The share of the bandwidth that other operations reach.
        seconds_per_call: What every call costs besides.
        overlaps: Whether calls are issued while earlier ones run, so that only the longer of both counts.
        source: Where these figures are from.
    """

    efficiency: Mapping[str, float]
    bandwidth: float
    seconds_per_call: float
    overlaps: bool
    source: str


# `python scripts/fit_step_time.py` prints the first of these.
CPU_COSTS = Costs(
    efficiency={"linear": 0.98, "attention": 0.98, "int8": 1.0},
    bandwidth=0.5,
    seconds_per_call=4.1e-5,
    overlaps=False,
    source=(
        "fitted to 22 rows of benchmarks/results/cpu.json: Intel(R) Xeon(R) Processor, 2 threads; the share of the "
        "bandwidth is assumed until it is fitted on an idle machine"
    ),
)
GPU_COSTS = Costs(
    efficiency={"linear": 0.7, "attention": 0.5, "int8": 0.6},
    bandwidth=0.8,
    seconds_per_call=CPU_COSTS.seconds_per_call,
    overlaps=True,
    source=(
        "assumed, not measured: in XLA's table of an H100 (matmul_interpolator_data.h) large bfloat16 products reach "
        "0.5 to 0.8 of its data sheet's rate; a call takes the host as long as on the CPU that was fitted"
    ),
)
COSTS = {"cpu": CPU_COSTS, "cuda": GPU_COSTS}
"""By the kind of device."""


class Parts(NamedTuple):
    """What a step's seconds are made of.

    Attributes:
        products: Matrix products.
        memory: Bytes of everything else.
        calls: What the calls themselves cost.
        total: The step; less than the sum where a device computes while calls are issued.
    """

    products: float
    memory: float
    calls: float
    total: float


def step_seconds(work: Work, device: Device, costs: Costs | None = None) -> Parts:
    """Predict how long a device takes for a step.

    Args:
        work: What the step does.
        device: The device.
        costs: How much of its rates it reaches; by default those in `COSTS`.
    """
    costs = costs or COSTS[device.kind]
    products = memory = 0.0
    for call, n in work.calls.items():
        moving = call.n_bytes / (device.bandwidth * costs.bandwidth)
        if call.kind == "other":
            memory += n * moving
            continue
        rate, served = device.rate(call.dtype)
        kind = "linear" if call.kind == "int8" and served != "int8" else call.kind
        products += n * max(call.operations / (rate * costs.efficiency[kind]), moving)
    calls = work.n_calls * costs.seconds_per_call
    total = max(products + memory, calls) if costs.overlaps else products + memory + calls
    return Parts(products, memory, calls, total)


def this_cpu() -> Device:
    """Measure the processor that this process runs on, with its threads: some seconds, once."""
    cpu = torch.device("cpu")
    rates = {"float32": floor_rate(cpu, torch.float32), "int8": int8_product_rate(cpu)}
    rates["bfloat16"] = floor_rate(cpu, torch.bfloat16) if has_bfloat16_units(cpu) else rates["float32"]
    known = {name: rate for name, rate in rates.items() if rate is not None}
    source = f"{cpu_model()}, {torch.get_num_threads()} thread(s), measured now"
    return Device(THIS_CPU, memory_limit().n_bytes, _copy_rate(), known, source, kind="cpu")


def nominal(device: torch.device) -> Device:
    """Return figures of a device that are the same in every run, for choices that must be, too.

    Args:
        device: A GPU, whose name decides (an A100 if it is not known); or a CPU, whose products have the rates that
            this machine keeps in a file.
    """
    if device.type == "cuda":
        try:
            return find_device(torch.cuda.get_device_name(device))
        except (FastLNError, RuntimeError, AssertionError):  # another GPU, or none here
            return find_device("A100")
    rates = {name: torch.get_num_threads() * rate for name, rate in units.rates().items()}
    return Device(
        THIS_CPU, 0, NOMINAL_BANDWIDTH, {"float32": NOMINAL_RATE} | rates, "this machine's file of rates", kind="cpu"
    )


NOMINAL_RATE, NOMINAL_BANDWIDTH = 1e11, 1e10
"""Of a CPU: operations per second where no rate is known, and bytes per second. Both are only orders of magnitude."""


def _copy_rate(n_bytes: int = 1 << 27, repeats: int = 5) -> float:
    """Measure the bytes per second of a copy, which are read and written."""
    source, target = (torch.ones(n_bytes, dtype=torch.uint8) for _ in range(2))
    seconds = []
    for _ in range(1 + repeats):  # the first is a warm-up
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * n_bytes / min(seconds[1:])


def step_work(model: nn.Module, batch: Mapping[str, Any], *, optimizer: bool = True) -> Work:
    """Run one training step, forward and backward, and return what it did.

    What waits in a prepared model until it is read does not wait on meta. There, logits and what comes after the last
    attention count only for the share of rows that have a label. For labels of whole samples all rows count.

    Args:
        model: Stock, peft's or prepared, in training mode, on any device. It is unchanged afterwards.
        batch: The model's arguments, with labels. For a model on the meta device they may be on any device; only labels
            with values tell which rows have one.
        optimizer: Whether to add AdamW's step over the trained parameters.

    Raises:
        FastLNError: If nothing that the model returns depends on what trains.
    """
    forget_rows()  # other models'
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    inputs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), dict(batch)) if is_meta else dict(batch)
    waiting = _waiting(model, batch) if is_meta else None
    counter = _Counter(waiting)
    with without_gradients(trained), AsOnCPU() if is_meta else nullcontext(), counter:
        with counter.watching():
            loss = loss_of(model(**inputs))
        run_backward(loss)
    forget_rows()
    work = Work(counter.calls)
    return work.plus(_of_optimizer(trained)) if optimizer and trained else work


def step_memory_and_work(model: nn.Module, batch: Mapping[str, Any]) -> tuple[StepMemory, Work]:
    """Return what `step_memory` and `step_work` return, from one step on the meta device."""
    counter = _Counter(_waiting(model, batch))
    with counter, counter.watching():
        memory = step_memory(model, batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return memory, Work(counter.calls).plus(_of_optimizer(trained))


def _of_optimizer(trained: list[nn.Parameter]) -> Call:
    moved = sum(p.numel() * (OPTIMIZER_BYTES + MASTER_BYTES * (p.dtype != torch.float32)) for p in trained)
    return Call("other", "", 0.0, float(moved))


@dataclass(frozen=True)
class _Waiting:
    """What would wait in a prepared model.

    Attributes:
        share: The share of rows that is computed.
        since: The module with which they begin, in the order of the forward pass.
    """

    share: float
    since: nn.Module


def _waiting(model: nn.Module, batch: Mapping[str, Any]) -> _Waiting | None:
    labels = batch.get("labels")
    base = next((module for module in model.modules() if prepared(module) is not None), None)
    # Labels of whole samples do not say which rows are read.
    if base is None or not isinstance(labels, Tensor) or labels.is_meta or not labels.numel() or labels.ndim < 2:
        return None
    state = prepared(base)
    assert state is not None
    changes = state.plan.changes
    heads, blocks = ([c.name for c in changes if c.trick == trick] for trick in ("late_logits", "late_rows"))
    # The last stack is the one whose rows the labels belong to. Others are read in full, by attention.
    since = (*heads[:1], *blocks[-1:])
    if not since:
        return None
    return _Waiting(float((labels != IGNORE_INDEX).double().mean()), base.get_submodule(since[-1]))


_FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view", "detach", "alias")
_PICKS = ("embedding", "index", "index_select", "gather", "embedding_dense_backward", "nll_loss_forward")
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


class _Counter(TorchDispatchMode):
    """Notes every call.

    Attributes:
        calls: How often each call was made.
    """

    def __init__(self, waiting: _Waiting | None) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()
        self._waiting = waiting
        self._first: int | None = None  # the number of the first of autograd's nodes whose rows would wait

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notice where late rows begin while this is open, around the forward pass."""
        if self._waiting is None:
            yield
            return
        hook = self._waiting.since.register_forward_pre_hook(self._begin)
        try:
            yield
        finally:
            hook.remove()

    def _begin(self, *_: Any) -> None:
        if self._first is None:  # else it is computed again
            self._first = _get_sequence_nr()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func` and note what it did."""
        results = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name.rpartition("::")[2]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]
        if name in _FREE or not made or _only_views(func, given, made):
            return results
        tensors = made * 2 if name in _PICKS else [*given, *made]
        kind, operations = _products(func, name, args, kwargs or {}, results)
        dtype = "int8" if kind == "int8" else _dtype(given) if operations else ""
        share = self._share()
        self.calls[Call(kind, dtype, operations * share, sum(map(_n_bytes, tensors)) * share)] += 1
        return results

    def _share(self) -> float:
        if self._waiting is None or self._first is None:
            return 1.0
        node = torch._C._current_autograd_node()
        # In the forward pass the number is that of the next node; in the backward, of the node that runs.
        is_late = (_get_sequence_nr() if node is None else node._sequence_nr()) >= self._first
        return self._waiting.share if is_late else 1.0


def _only_views(func: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    if func._schema.is_mutable:
        return False
    memory = {tensor.untyped_storage()._cdata for tensor in given}
    return all(tensor.untyped_storage()._cdata in memory for tensor in made)


def _n_bytes(tensor: Tensor) -> int:
    """The bytes of a tensor; repeated ones of an expanded tensor count once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _dtype(given: list[Tensor]) -> str:
    return next(str(tensor.dtype).removeprefix("torch.") for tensor in given if tensor.is_floating_point())


def _products(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], results: Any) -> tuple[str, float]:
    """Return the kind of a call, and the operations of its products."""
    if name in _OWN:
        kind, count = _OWN[name]
        names = (argument.name for argument in func._schema.arguments)
        return kind, count(dict(zip(names, args, strict=False)) | kwargs)
    known = flop_registry.get(func.overloadpacket)
    if known is None:
        return "other", 0.0
    kind = "attention" if "bmm" in name or "attention" in name else "linear"
    return kind, float(known(*args, **kwargs, out_val=results))


def _attention(given: dict[str, Any], n_products: int) -> float:
    q, k = _first(given, "query", "q"), _first(given, "key", "k")
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    pairs = n_queries * n_keys
    if _first(given, "is_causal", "causal"):
        pairs = sum(min(query + 1, n_keys) for query in range(n_queries))
    return 2.0 * q.numel() // (n_queries * q.shape[-1]) * pairs * q.shape[-1] * n_products


def _first(given: dict[str, Any], *names: str) -> Any:
    return next((given[name] for name in names if name in given), None)


def _attention_backward(given: dict[str, Any]) -> float:
    """The scores again, dv, the gradient of the scores, and from that dq and dk."""
    wanted = {name: given.get(f"need_{name}", True) for name in ("dq", "dk", "dv")}
    return _attention(given, 1 + (wanted["dq"] or wanted["dk"]) + sum(wanted.values()))


def _int8_linear(given: dict[str, Any]) -> float:
    rows = _first(given, "x", "dy")
    terms = 2 if given.get("rest_values") is not None else 1
    return 2.0 * (rows.numel() // rows.shape[-1]) * given["values"].numel() * terms


_OWN: dict[str, tuple[str, Callable[[dict[str, Any]], float]]] = {
    _ATTENTION: ("attention", lambda given: _attention(given, 2)),
    f"{_ATTENTION}_backward": ("attention", _attention_backward),
    "attention": ("attention", lambda given: _attention(given, 2)),
    "attention_backward": ("attention", _attention_backward),
    "int8_linear": ("int8", _int8_linear),
    "int8_linear_backward": ("int8", _int8_linear),
}
"""Operations whose products torch's own counter does not know: their kind, and the operations from the arguments."""

"""Everything that a plan says, as data: `forecast` makes it, `fastln.planning.report` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fastln.data import DataOptions
from fastln.devices import DEVICES, THIS_CPU, Device, find_device
from fastln.errors import FastLNError
from fastln.machine import settle_device
from fastln.methods import get_method
from fastln.models.example import USUAL, BatchSize, Example
from fastln.models.outline import outline
from fastln.models.shapes import is_shape
from fastln.models.sources import expanded_sources
from fastln.ops.settings import STORAGES
from fastln.peak import StepMemory
from fastln.planning.candidate import OFFLOAD, Candidate
from fastln.planning.corpus import Corpus, clipped, read_corpus
from fastln.planning.search import largest, on_the_line
from fastln.settings import MethodSettings
from fastln.step_time import Parts, Work, step_seconds, this_cpu

MOST_SAMPLES = 1 << 16
MOST_PIXELS = 1 << 13  # along an image's edge
AS_FAST = 0.03
"""The share by which predicted times of one model's modes must differ for one to count as faster."""


@dataclass(frozen=True)
class Request:
    """What a user asks for.

    Attributes:
        model: As `fastln.models.outline` takes it.
        method: The tuning method.
        size: The batch's size; what it leaves open is usual.
        activations: What fastln's operations keep for backward.
        products: How products of frozen weights run.
        dtype: "float32", "bfloat16", or "auto": bfloat16 where the device has units for it, else float32.
        budget: Bytes of memory that there are; None for the device's, if one is named.
        device: The name of a device; None for all.
        data: A dataset; None for no minutes per epoch.
        options: How to read it.
    """

    model: str
    method: str = "layernorm"
    size: BatchSize = USUAL
    activations: str = "exact"
    products: str = "exact"
    dtype: str = "auto"
    budget: int | None = None
    device: str | None = None
    data: str | None = None
    options: DataOptions = field(default_factory=DataOptions)


@dataclass(frozen=True)
class Row:
    """One way to train, predicted.

    Attributes:
        label: Its name in tables.
        candidate: How it is set up.
        memory: The memory of a step.
        work: What a step does.
        n_trained: The number of parameters that train.
        time: The time of a step on the plan's device.
        largest_batch: The largest batch that fits; None without a budget.
    """

    label: str
    candidate: Candidate
    memory: StepMemory
    work: Work
    n_trained: int
    time: Parts
    largest_batch: int | None


@dataclass(frozen=True)
class Forecast:
    """A plan. Every number in it is predicted, but the rates of `fastln.step_time.this_cpu`.

    Attributes:
        request: What was asked for.
        model: The model's class.
        dtype: The model's dtype.
        n_parameters: All parameters of the model.
        batch: The batch that memory is predicted for.
        size: Its size.
        corpus: The data; None without.
        usual: The size of a usual batch, for the time of an epoch; that of `batch` without data.
        device: The device of the comparison.
        budget: Bytes of memory; None if nobody said.
        ours: What was asked for.
        others: Other methods beside it.
        modes: What was asked for, with each storage mode.
        times: For each device the time of a usual step of `ours`.
        largest_image: The largest edge of images that fits, with the batch asked for; None without images or budget.
        notes: What could not be predicted, and why.
    """

    request: Request
    model: str
    dtype: str
    n_parameters: int
    batch: Example
    size: BatchSize
    corpus: Corpus | None
    usual: BatchSize
    device: Device
    budget: int | None
    ours: Row
    others: tuple[Row, ...]
    modes: tuple[Row, ...]
    times: Mapping[str, tuple[Device, Parts]]
    largest_image: int | None
    notes: tuple[str, ...]

    @property
    def best(self) -> Row | None:
        """The fastest mode that fits; the fastest of all without a budget, None if none fits or there are no modes.

        Of modes that are as fast, up to what can be predicted, it is the one that rounds least.
        """
        fitting = [row for row in self.modes if self.budget is None or row.memory.peak <= self.budget]
        fastest = min((row.time.total for row in fitting), default=0.0)
        return next((row for row in fitting if row.time.total <= (1 + AS_FAST) * fastest), None)

    @property
    def front(self) -> list[Row]:
        """The modes than which none is both smaller and faster, from small to large."""
        by_peak = sorted(self.modes, key=lambda row: (row.memory.peak, row.time.total))
        kept: list[Row] = []
        for row in by_peak:
            if not kept or row.time.total < kept[-1].time.total:
                kept.append(row)
        return kept


def forecast(request: Request) -> Forecast:
    """Predict memory and time of a training step, of the ways to run it, and of other methods.

    Raises:
        FastLNError: For an unknown model, method, mode or device; for sizes that the model does not take; for a budget
            below the weights.
    """
    _, engine = get_method(request.method)
    settings = MethodSettings.of(request.method, engine, activations=request.activations, products=request.products)
    device = _device(request.device)
    dtype = _dtype(request.dtype, device)
    kind = device.kind if request.device else settle_device("auto").type
    ours = Candidate(request.model, settings, dtype, kind)
    size = ours.settled(request.size)
    own = ours.batch(size)
    corpus = _corpus(request, own)
    usual = size
    if corpus is not None and own.text_length is not None and size.text_length is None:
        most = None if own.most_tokens is None else own.most_tokens - own.n_image_tokens
        usual = replace(size, text_length=clipped(corpus.mean_tokens, most))
        size = replace(size, text_length=clipped(corpus.most_tokens, most))
    batch = ours.batch(size)
    budget = request.budget or (device.memory if request.device else None)
    maker = _Maker(device, budget, size, usual)
    _check_budget(ours, size, budget, device if request.budget is None else None)
    first = maker.row(_label(settings), ours)
    others, notes = maker.others(request, dtype, kind)
    modes = maker.modes(first, settings, request)
    names = {device.name: device} if request.device else {**DEVICES, device.name: device}
    times = {name: (each, step_seconds(maker.usual_work(first), each)) for name, each in names.items()}
    return Forecast(
        request=request,
        model=type(outline(request.model)).__name__,
        dtype=dtype,
        n_parameters=ours.counts()[1],
        batch=batch,
        size=size,
        corpus=corpus,
        usual=usual,
        device=device,
        budget=budget,
        ours=first,
        others=others,
        modes=modes,
        times=times,
        largest_image=maker.largest_image(ours, batch),
        notes=notes,
    )


def _device(name: str | None) -> Device:
    return this_cpu() if name is None or name.lower() == THIS_CPU else find_device(name)


def _dtype(name: str, device: Device) -> str:
    if name not in ("auto", "float32", "bfloat16"):
        raise FastLNError(f"unknown dtype {name!r} (valid: auto, float32, bfloat16)")
    if name != "auto":
        return name
    served = device.rates.get("bfloat16", 0.0)
    return "bfloat16" if served and (device.kind == "cuda" or served > device.rates["float32"]) else "float32"


def _corpus(request: Request, own: Example) -> Corpus | None:
    if request.data is None:
        return None
    kind, _, rest = expanded_sources(request.model).partition(":")
    source = rest if kind in ("blip", "chat") else request.model
    labels = own.arguments.get("labels")
    with_answers = "decoder_input_ids" not in own.arguments and labels is not None and labels.ndim > 1
    return read_corpus(
        request.data, "" if is_shape(request.model) else source, request.options, with_answers=with_answers
    )


def _label(settings: MethodSettings) -> str:
    parts = [f"{settings.method}/{settings.engine}"]
    parts += [value for value in (settings.activations, settings.products) if value != "exact"]
    return " ".join(parts)


def _check_budget(ours: Candidate, size: BatchSize, budget: int | None, device: Device | None) -> None:
    if budget is None:
        return
    weights = ours.memory(size).weights
    if budget < weights:
        where = f"{device.name}'s memory" if device is not None else "the budget"
        raise FastLNError(
            f"{where}, {budget / 2**30:,.2f} GiB, is below the weights alone: {ours.spec} has "
            f"{weights / 2**30:,.2f} GiB in {ours.dtype} (predicted); give more memory, a smaller dtype or "
            "--products int8"
        )


@dataclass
class _Maker:
    """Makes rows."""

    device: Device
    budget: int | None
    size: BatchSize
    usual: BatchSize

    def row(self, label: str, candidate: Candidate) -> Row:
        memory, work = candidate.memory_and_work(self.size)
        time = step_seconds(work, self.device)
        return Row(label, candidate, memory, work, candidate.counts()[0], time, self.largest_batch(candidate, memory))

    def usual_work(self, row: Row) -> Work:
        return row.work if self.usual == self.size else row.candidate.memory_and_work(self.usual)[1]

    def largest_batch(self, candidate: Candidate, memory: StepMemory) -> int | None:
        if self.budget is None:
            return None
        n_samples = self.size.n_samples or 1
        if memory.phase != "optimizer":  # then all that does not grow with the batch is known
            fixed = memory.weights + memory.gradients + memory.optimizer
            return min(on_the_line((0, fixed), (n_samples, memory.peak), self.budget), MOST_SAMPLES)
        twice = candidate.memory(replace(self.size, n_samples=2 * n_samples)).peak
        return min(on_the_line((n_samples, memory.peak), (2 * n_samples, twice), self.budget), MOST_SAMPLES)

    def largest_image(self, candidate: Candidate, batch: Example) -> int | None:
        if self.budget is None or batch.image_size is None or batch.n_image_tokens:
            return None

        def peak(n_steps: int) -> int:
            return candidate.memory(replace(self.size, image_size=n_steps * batch.step)).peak

        try:
            most = MOST_PIXELS // batch.step
            return batch.step * largest(peak, self.budget, start=batch.image_size // batch.step, most=most)
        except FastLNError:  # it reads images of its own size alone
            return None

    def modes(self, first: Row, settings: MethodSettings, request: Request) -> tuple[Row, ...]:
        """Return a row for each storage mode, if fastln runs the method."""
        if settings.engine != "fastln":
            return ()
        rows = []
        for name in (name for name, storage in STORAGES.items() if storage.block != OFFLOAD):
            own = replace(settings, activations=name)
            same = name == settings.activations
            rows.append(first if same else self.row(_label(own), replace(first.candidate, settings=own, _made=None)))
        return tuple(rows)

    def others(self, request: Request, dtype: str, kind: str) -> tuple[tuple[Row, ...], tuple[str, ...]]:
        """Return rows of other methods, and why some are missing."""
        wanted = {}
        if "torch" in get_method(request.method)[0].engines:
            stock = MethodSettings.of(request.method, "torch")
            wanted["stock " + _label(stock)] = Candidate(request.model, stock, dtype, kind)
            wanted["the same, checkpointed"] = Candidate(request.model, stock, dtype, kind, checkpoints=True)
        lora, full = MethodSettings.of("lora", "peft"), MethodSettings.of("full", "torch")
        wanted["lora/peft"] = Candidate(request.model, lora, dtype, kind)
        wanted["QLoRA (4-bit base)"] = Candidate(request.model, lora, dtype, kind, four_bits=True)
        wanted["full/torch"] = Candidate(request.model, full, dtype, kind)
        rows, notes = [], []
        for label, candidate in wanted.items():
            try:
                rows.append(self.row(label, candidate))
            except (FastLNError, ValueError) as error:  # transformers: a class without checkpointing
                notes.append(f"{label}: {' '.join(str(error).split())}")
        return tuple(rows), tuple(notes)

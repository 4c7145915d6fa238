"""The work of one process of a suite: build a model, apply a method, then time steps or count correct answers."""

import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from fastln.bench.results import Checked, Floor, Job, Quality, Steps
from fastln.bench.storage import Batch, chosen, largest, set_up, settled_budget
from fastln.cost import count_operations
from fastln.data import VQADataset, load_dataset
from fastln.errors import FastLNError
from fastln.memory import AllocatorPeak, SavedActivations, peak_bytes, reset_peak, synchronize
from fastln.methods import count_parameters
from fastln.models import Task, VQATask, load_task
from fastln.models.shapes import ShapeTask, is_shape, make_shape
from fastln.rates import floor_rate, int8_product_rate
from fastln.training import TrainConfig, build_optimizer, evaluate, train_task
from fastln.training.optimizer import rates_in_use
from fastln.training.tasks import apply_method
from fastln.training.train import epochs_of


def work(job: Job) -> Checked | Steps | Quality:
    """Do one job. Called in a separate process.

    Raises:
        FastLNError: If the data, the model or the method cannot be loaded, there are too few questions for a batch, or
            an image cannot be read.
    """
    by_allocator = job.kind == "speed" and job.suite.peak == "allocator" and job.suite.device == "cpu"
    if not by_allocator:
        return _work(job, None)
    with AllocatorPeak() as allocated:  # before the model is made, whose tensors would not count otherwise
        return _work(job, allocated)


def _work(job: Job, allocated: AllocatorPeak | None) -> Checked | Steps | Quality:
    options: dict[str, Any] = {
        "dtype": getattr(torch, job.dtype),
        "seed": job.suite.seed,
        "device": job.suite.device,
    }
    if is_shape(job.model):
        shape = make_shape(job.model, **options)
        return _check(job, shape, None) if job.kind == "check" else _steps(job, shape, None, allocated)
    data = load_dataset(job.suite.data, "train", options=job.suite.options)
    task = load_task(job.model, data, **options, image_size=job.suite.image_size)
    if job.kind == "check":
        return _check(job, task, data)
    return _steps(job, task, data, allocated) if job.kind == "speed" else _quality(job, task, data)


def _check(job: Job, task: Task, data: VQADataset | None) -> Checked:
    suite = job.suite
    model = apply_method(task, "layernorm", "torch").train()
    # Reads every image that the rounds will read.
    batches = itertools.islice(_batches(job, task, data), 1 if data is None else suite.warmup_steps + suite.steps)
    operations = [count_operations(model, batch) for batch in batches]
    if suite.epochs and data and any(sample.is_report for sample in _test_questions(job).samples):
        raise FastLNError(f"{data.name} contains reports, so there are no answers to count; set epochs to 0")
    timed = operations[-suite.steps :]
    device, dtype = torch.device(suite.device), getattr(torch, job.dtype)
    rate, int8_rate = floor_rate(device, dtype), int8_product_rate(device) if "int8" in suite.products else None
    floor = Floor(mean(o.all for o in timed), rate, mean(o.in_linears for o in timed), int8_rate)
    if data is None:
        return Checked(task.name, task.random_weights, "random batches", synthetic=True, floor=floor)
    return Checked(task.name, task.random_weights, data.name, data.synthetic, floor)


def _steps(job: Job, task: Task, data: VQADataset | None, allocated: AllocatorPeak | None) -> Steps:
    suite = job.suite
    _, total = count_parameters(task.model)
    device = torch.device(suite.device)
    settings = _config(job).settings(job.engine)
    predicts = job.round == 1 and suite.peak == "allocator"
    most = _largest(job, task, data) if predicts or job.memory_budget else None
    if most is not None:
        settings = replace(settings, memory_budget=settled_budget(job, task, settings, most))
    model, predicted = set_up(job, task, settings, most if predicts else None)
    batches = _batches(job, task, data)
    optimizer = build_optimizer(model, task, _config(job))
    model.train()
    torch.manual_seed(suite.seed)  # same dropout for methods that draw random numbers in the same way
    memory_kind = reset_peak(device) if allocated is None else allocated.kind

    def step() -> Tensor:
        loss = model(**next(batches)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    note = None
    if job.memory_budget and most is not None:
        model(**most)  # a larger batch later would choose again, while the clock runs
        predicted, note = chosen(model)
    for _ in range(suite.warmup_steps):
        step()
    # This batch comes from a separate iterator, so that every round times the same batches.
    saved = _saved_bytes(model, next(_batches(job, task, data))) if job.round == 1 else None
    if allocated is not None:
        gc.collect()
        allocated.reset()  # compilation and the choice of storage are not part of a step
    seconds, loss = [], torch.tensor(0.0)
    for _ in range(suite.steps):
        elapsed, loss = _timed(step, device)
        seconds.append(elapsed)
    return Steps(
        step_seconds=tuple(seconds),
        peak_memory_bytes=peak_bytes(device) if allocated is None else allocated.bytes,
        memory_kind=memory_kind,
        saved_activation_bytes=saved,
        trainable_parameters=count_parameters(model)[0],
        total_parameters=total,
        final_loss=float(loss),
        learning_rates=rates_in_use(model, task.head_under(job.method), _config(job).rates),
        predicted_peak_bytes=predicted,
        storage_note=note,
    )


def _largest(job: Job, task: Task, data: VQADataset | None) -> Batch:
    """Return the largest batch of a round."""
    n_steps = 1 if data is None else job.suite.warmup_steps + job.suite.steps
    return largest(itertools.islice(_batches(job, task, data), n_steps))


def _timed(step: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    synchronize(device)
    start = time.perf_counter()
    loss = step()
    synchronize(device)
    return time.perf_counter() - start, loss


def _saved_bytes(model: nn.Module, batch: dict[str, Any]) -> int:
    with SavedActivations(model) as saved:
        output = model(**batch)
    del output
    return saved.bytes


def _batches(job: Job, task: Task, data: VQADataset | None) -> Iterator[dict[str, Any]]:
    """Yield full batches forever, in an order that depends only on the seed. A shape repeats its one batch."""
    suite = job.suite
    if isinstance(task, ShapeTask):
        yield from itertools.repeat(task.batch)
    assert isinstance(task, VQATask)
    assert data is not None
    sampler = task.batches(
        data, suite.batch_size, seed=suite.seed, questions_per_image=suite.questions_per_image, drop_last=True
    )
    if len(sampler) == 0:
        raise FastLNError(
            f"batch_size {suite.batch_size} is too large: {data.name} has only {len(data)} training questions"
        )
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        for indices in sampler:
            yield task.collate([data[index] for index in indices], data)


def _config(job: Job) -> TrainConfig:
    suite = job.suite
    return TrainConfig(
        method=job.method,
        products=job.products,
        activations=job.activations,
        epochs=max(suite.epochs, 1),
        head_epochs=suite.head_epochs,
        batch_size=suite.batch_size,
        questions_per_image=suite.questions_per_image,
        seed=suite.seed,
    )


def _quality(job: Job, task: VQATask, data: VQADataset) -> Quality:
    config = _config(job)
    if job.memory_budget:
        batch = _largest(job, task, data)
        budget = settled_budget(job, task, config.settings(job.engine), batch)
        config = replace(config, memory_budget=budget)
    head_epochs, epochs = epochs_of(task, config)
    train_task(task, data, config, engine=job.engine, progress=False)
    accuracy = evaluate(task, _test_questions(job))
    return Quality(dataclasses.asdict(accuracy), head_epochs, epochs)


def _test_questions(job: Job) -> VQADataset:
    return load_dataset(job.suite.data, "test", options=job.suite.options)

"""A prepared model's hold on the arena: taken once, given back once, and never by a copy."""

import copy
import gc
import logging
import pickle

import pytest
import torch

import fastln
from fastln import machine
from fastln.standins.arena import Arena
from fastln_kernels.cpu import memory
from fastln_kernels.cpu.library import KernelsUnavailableError

pytestmark = pytest.mark.skipif(memory.why_not() is not None, reason=f"{memory.why_not()}")


@pytest.fixture(autouse=True)
def _nobody_else():
    gc.collect()  # models of earlier tests
    before = memory.users()
    yield
    gc.collect()
    assert memory.users() == before


@pytest.fixture
def added():
    before = memory.users()
    return lambda: memory.users() - before


def put():
    arena = Arena()
    arena.put()
    return arena


def test_it_is_taken_once_and_given_back_once(added):
    arena = Arena()
    assert not arena.holds
    arena.put()
    arena.put()
    assert arena.holds
    assert added() == 1
    arena.remove()
    arena.remove()
    assert not arena.holds
    assert added() == 0
    arena.put()
    assert added() == 1
    arena.remove()


def test_two_models_hold_it_until_both_let_go(added):
    first, second = put(), put()
    assert added() == 2
    first.remove()
    assert added() == 1
    second.remove()
    assert added() == 0


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda arena: pickle.loads(pickle.dumps(arena))])
def test_a_copy_holds_nothing(added, duplicate):
    arena = put()
    other = duplicate(arena)
    assert not other.holds
    assert added() == 1
    other.remove()
    assert added() == 1
    arena.remove()
    assert added() == 0


def test_it_ends_with_what_holds_it(added):
    holder = [put()]
    assert added() == 1
    holder.clear()
    gc.collect()
    assert added() == 0


def test_a_refusal_is_one_warning(monkeypatch, caplog, added):
    def refuse(n_bytes):
        raise KernelsUnavailableError("torch has an allocator of higher priority")

    monkeypatch.setattr(machine.memory, "install", refuse)
    arena = put()
    assert not arena.holds
    (record,) = [record for record in caplog.records if record.name.startswith("fastln")]
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "CPU memory: torch's allocator stays (torch has an allocator of higher priority)"
    arena.remove()


def norm():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))


def test_the_plan_says_why_it_is_not_used(monkeypatch, added):
    assert "arena" in [change.stand_in for change in fastln.plan(norm()).changes]
    assert "arena" not in [change.stand_in for change in fastln.plan(norm(), without="arena").changes]
    assert added() == 0
    monkeypatch.setenv("FASTLN_KEEP_PAGES", "0")
    plan = fastln.plan(norm())
    assert "arena" not in [change.stand_in for change in plan.changes]
    assert ("memory of large tensors", "FASTLN_KEEP_PAGES=0 switches it off") in [
        (stay.kind, stay.reason) for stay in plan.stays
    ]


def test_a_prepared_model_holds_it_until_it_is_restored_or_gone(added):
    model = fastln.prepare(norm())
    assert added() == 1
    other = copy.deepcopy(model)
    assert added() == 1
    fastln.restore(other)
    assert added() == 1
    fastln.restore(model)
    assert added() == 0
    fastln.prepare(model)
    assert added() == 1
    del model
    gc.collect()
    assert added() == 0

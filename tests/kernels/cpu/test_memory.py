"""The arena of large tensors: whole, aligned, separate blocks; holes that merge; children; what release gives back."""

import itertools
import json
import os
import random
import subprocess
import sys
import threading

import pytest
import torch

from fastln_kernels.cpu import library, memory
from fastln_kernels.cpu.library import KernelsUnavailableError

# Elsewhere it must work.
needs_arena = pytest.mark.skipif(
    sys.platform != "linux" or not library.compiler() or os.environ.get("FASTLN_CPU_KERNELS") == "0",
    reason="no Linux, no compiler, or compiled kernels are switched off",
)
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

START = """
import gc, os, resource, threading, torch
from fastln_kernels.cpu import memory
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
def empty(n_bytes):
    return torch.empty(n_bytes, dtype=torch.uint8)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
def reserved():
    return int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
"""

# In a process of its own, whose arena nothing else has cut up.
HOLES = """
memory.install(GIB)
sizes = (MIB, 2 * MIB, 3 * MIB, 4 * MIB, MIB - 1, 64 * KIB)
begins = (0, MIB, 3 * MIB, 6 * MIB, 10 * MIB, 11 * MIB)  # each where the one before ends
begin, blocks = empty(MIB).data_ptr(), []
def place(tensor):
    return tensor.data_ptr() - begin
def free(*which):  # of as many blocks as there are sizes
    blocks.clear()
    blocks.extend(empty(n) for n in sizes)
    assert tuple(map(place, blocks)) == begins
    for number in which:
        blocks[number] = None
free(0, 1)  # the neighbour before is free
assert place(empty(3 * MIB)) == 0
free(2, 1)  # the one after
assert place(empty(5 * MIB)) == MIB
free(0, 2, 1)  # both
assert place(empty(6 * MIB)) == 0
free(1, 3)  # the smallest hole that is large enough; what is left of it stays free
first, second, third = empty(MIB), empty(3 * MIB), empty(MIB)
assert (place(first), place(second)) == (MIB, 6 * MIB)
assert place(third) == 2 * MIB  # of two that fit alike the lowest
"""

SMALL_ONES_STAY = """
memory.install(GIB)
kept, addresses = [], []
for n in (8, 40, 20, 80):  # as many bytes each time, in other pieces
    tensors = []
    for _ in range(80 // n):
        tensors.append(empty(n * MIB))
        kept.append(empty(KIB))
        addresses.append(tensors[-1].data_ptr())
        assert addresses[-1] + n * MIB <= addresses[0] + 80 * MIB
"""

CHILDREN = """
torch.set_num_threads(1)  # OpenMP's do not survive a fork
before = empty(MIB).fill_(7)
memory.install(GIB)
weights = empty(MIB).fill_(3)
stop = threading.Event()
def work():
    while not stop.is_set():
        assert (empty(100 * KIB).fill_(1) == 1).all()
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(10):
    child = os.fork()
    if not child:
        mine = empty(MIB).fill_(4)
        good = (weights == 3).all() and (mine == 4).all() and mine.data_ptr() != weights.data_ptr()
        del mine, globals()["weights"]
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
assert (weights == 3).all()
# A tensor from before is torch's standard allocator's, and stays so when it grows.
before.untyped_storage().resize_(2 * MIB)
assert (before == 7).all()
data = torch.utils.data.DataLoader(torch.arange(4.0).repeat_interleave(MIB // 4).view(4, -1), num_workers=2)
assert [batch.mean().item() for batch in data] == [0, 1, 2, 3]
"""

# What the last user gives back, with tensors that live on and without; and once more.
RELEASE = """
before, addresses = resident(), reserved()
for _ in range(2):
    assert memory.install(8 * GIB) == 8 * GIB
    assert memory.install(GIB) == 0  # the second user shares it
    assert memory.users() == 2
    kept, freed, small = empty(100 * MIB).fill_(3), empty(200 * MIB).fill_(4), empty(KIB).fill_(5)
    del freed
    assert resident() - before > 290 * MIB
    memory.release()
    assert memory.users() == 1
    assert resident() - before > 290 * MIB  # one user is left
    begin = kept.data_ptr()
    assert begin < empty(MIB).data_ptr() < begin + 8 * GIB
    memory.release()
    assert memory.users() == 0
    assert 100 * MIB <= resident() - before < 150 * MIB
    assert not begin <= empty(100 * MIB).data_ptr() < begin + 8 * GIB
    grown = kept.untyped_storage()
    assert (kept == 3).all() and (small == 5).all()
    assert reserved() - addresses > 8 * GIB  # the addresses stay as long as a tensor does
    grown.resize_(150 * MIB)  # by the allocator that it came from
    assert (kept == 3).all()
    assert not begin <= grown.data_ptr() < begin + 8 * GIB
    assert reserved() - addresses < 4 * GIB
    del kept, grown
    assert resident() - before < 50 * MIB
try:
    memory.release()
except RuntimeError as error:
    assert "without memory.install" in str(error)
else:
    raise AssertionError("released more often than installed")
"""

# Tensors of the arena that are freed after the release, in any order, each give their pages back.
FREED_LATE = """
memory.install(GIB)
tensors = [empty(10 * MIB + 64 * number).fill_(number) for number in range(10)]
memory.release()
for number in (3, 5, 4, 0, 9, 8, 1, 2, 7):
    before = resident()
    tensors[number] = None
    assert 9 * MIB < before - resident() < 11 * MIB, number
    assert all((tensor == value).all() for value, tensor in enumerate(tensors) if tensor is not None)
# With one tensor left it is installed again: the same arena, whose holes serve.
begin = tensors[6].data_ptr() - 60 * MIB
memory.install(2 * GIB)
assert begin - MIB < empty(20 * MIB).data_ptr() < begin + 10 * MIB
assert (tensors[6] == 6).all()
memory.release()
"""

FULL = """
memory.install(64 * MIB)
first = empty(40 * MIB)
second = empty(40 * MIB).fill_(1)  # torch's
assert not first.data_ptr() <= second.data_ptr() < first.data_ptr() + 64 * MIB
first.fill_(2)
assert (second == 1).all()
"""


ASKING_REPLACES_NOTHING = """
assert memory.why_not() is None
assert memory.users() == 0
first = empty(MIB)
assert abs(empty(MIB).data_ptr() - first.data_ptr()) != MIB  # glibc's blocks have a header between them
"""

# Where no addresses are to be had torch keeps its own.
NO_ADDRESSES = """
resource.setrlimit(resource.RLIMIT_AS, (8 * GIB, 8 * GIB))
try:
    memory.install(8 * GIB)
except memory.KernelsUnavailableError as error:
    assert "ulimit" in str(error), error
else:
    raise AssertionError("installed")
assert memory.users() == 0
assert (empty(MIB).fill_(1) == 1).all()
assert memory.install(GIB) == GIB
"""

# Both kinds of blocks count, and those that are freed after the count or after the arena.
COUNTED = """
def near(n_bytes, expected):
    assert expected <= n_bytes <= expected + 16 * KIB, (n_bytes, expected)
before = empty(8 * MIB)
memory.start_counting()
assert memory.live_bytes() == memory.peak_bytes() == 0
del before  # it began uncounted
assert memory.live_bytes() == 0
small, large = empty(KIB), empty(MIB)
near(memory.live_bytes(), MIB + KIB)
assert memory.install(GIB) == GIB
in_arena = empty(4 * MIB)
near(memory.live_bytes(), 5 * MIB + KIB)
del large, in_arena
near(memory.live_bytes(), KIB)
near(memory.peak_bytes(), 5 * MIB + KIB)
memory.reset_peak()
near(memory.peak_bytes(), KIB)
grows = torch.empty(0)
grows.resize_(MIB)  # 4 MiB
near(memory.peak_bytes(), 4 * MIB + KIB)
memory.start_counting()
memory.stop_counting()
held = empty(MIB)
near(memory.live_bytes(), 5 * MIB + KIB)
memory.stop_counting()
uncounted = empty(2 * MIB)
memory.release()
outside = empty(2 * MIB)
del small, held, grows, uncounted, outside
assert memory.live_bytes() == 0
memory.install(GIB)  # the arena first
memory.start_counting()
held = empty(2 * MIB)
memory.release()
later = empty(MIB)
near(memory.live_bytes(), 3 * MIB)
del held
near(memory.live_bytes(), MIB)
threads = [threading.Thread(target=lambda: [empty(size) for size in (10, MIB) * 500]) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
near(memory.live_bytes(), MIB)
memory.stop_counting()
assert memory.users() == 0
"""
PROGRAMS = {
    "holes": HOLES,
    "small ones stay": SMALL_ONES_STAY,
    "children": CHILDREN,
    "release": RELEASE,
    "counted": COUNTED,
    "freed late": FREED_LATE,
    "full": FULL,
    "asking replaces nothing": ASKING_REPLACES_NOTHING,
    "no addresses": NO_ADDRESSES,
}
# Each program in a fork of one process that has imported torch; that has no arena and no threads.
FORKS = """
import json, sys, traceback
for name, program in json.loads(sys.argv[1]).items():
    child = os.fork()
    if not child:
        try:
            exec(program, globals())
        except BaseException:
            print(f"{name}: {traceback.format_exc()}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(name, "fails" if status else "is right", flush=True)
"""


@needs_arena
def test_in_processes_of_their_own():
    memory.why_not()  # compiled, if it is not yet, by this process
    command = [sys.executable, "-c", START + FORKS, json.dumps(PROGRAMS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{name} is right" for name in PROGRAMS], done.stderr


@pytest.fixture
def arena():
    memory.install(GIB)
    yield
    memory.release()


@needs_arena
@pytest.mark.usefixtures("arena")
@pytest.mark.parametrize("n_bytes", [0, 1, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 5 * MIB + 3])
def test_every_size_is_aligned_and_apart(n_bytes):
    tensors = [torch.empty(n_bytes, dtype=torch.uint8) for _ in range(5)]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
    starts = sorted(tensor.data_ptr() for tensor in tensors)
    assert all(right - left >= n_bytes for left, right in itertools.pairwise(starts))


@needs_arena
@pytest.mark.usefixtures("arena")
def test_threads_that_free_each_other_s_tensors_see_their_own_values():
    held: list[tuple[torch.Tensor, int]] = [(torch.zeros(1), 0)] * 16
    wrong = []

    def work(seed):
        draw = random.Random(seed)
        for number in range(300):
            value = seed * 1000 + number
            tensor = torch.full((draw.choice((1, 1000, 20_000, 100_000, 400_000)) + draw.randrange(99),), float(value))
            place = draw.randrange(len(held))
            old, expected = held[place]
            held[place] = (tensor, value)
            if not (old == expected).all():
                wrong.append(expected)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all((tensor == value).all() for tensor, value in held)


@needs_arena
@pytest.mark.usefixtures("arena")
def test_what_no_machine_has_is_torch_s_error():
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(1 << 60, dtype=torch.uint8)


@needs_arena
@pytest.mark.usefixtures("arena")
def test_the_profiler_sees_large_tensors():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.empty(MIB, dtype=torch.uint8)
    assert max(event.self_cpu_memory_usage for event in profile.events()) == MIB


def test_without_compiled_kernels_the_error_says_why(monkeypatch):
    library.load.cache_clear()
    library.why_not.cache_clear()
    monkeypatch.setenv("FASTLN_CPU_KERNELS", "0")
    try:
        with pytest.raises(
            KernelsUnavailableError, match="FASTLN_CPU_KERNELS=0" if sys.platform == "linux" else "Linux"
        ):
            memory.install(GIB)
        assert memory.users() == 0
    finally:
        library.why_not.cache_clear()

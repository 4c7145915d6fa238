"""What the machine has: how much memory there is for us, and that freed memory is kept for the next step."""

import os
import resource
import subprocess
import sys

import psutil
import pytest
import torch

from fastln import machine
from fastln.machine import arena_limit, memory_limit, why_no_arena
from fastln_kernels.cpu import library, memory

CPU = torch.device("cpu")
MIB, GIB = 1 << 20, 1 << 30
needs_arena = pytest.mark.skipif(
    sys.platform != "linux" or not library.compiler() or os.environ.get("FASTLN_CPU_KERNELS") == "0",
    reason="no Linux, no compiler, or compiled kernels are switched off",
)

FAULTS = """
import resource, torch
from fastln.machine import install_arena
def step():
    for n in (1 << 20, 1 << 26, 1 << 24):  # 4 MiB, 256 MiB, 64 MiB
        torch.empty(n).fill_(1.0)
def faults():
    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
leaves = faults()
install_arena()
print(leaves, faults())
"""


@needs_arena
def test_memory_that_was_freed_is_not_mapped_again():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    leaves, keeps = map(int, done.stdout.split())
    assert keeps < 100
    assert leaves > 1000  # 80,000 pages of 4 KiB, or a 512th part of that where the kernel has huge ones


FIRST_USER = """
import logging
from fastln import machine
from fastln_kernels.cpu import memory

logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
machine.memory_limit = lambda: machine.MemoryLimit(3 << 30, "the cgroup's limit")
machine.install_arena()
machine.install_arena()
machine.release_arena()
assert memory.users() == 1
machine.release_arena()
assert memory.users() == 0
"""


@needs_arena
def test_the_first_user_of_the_arena_is_told_once_and_it_honours_the_limit():
    """In a process of its own: here, models that earlier tests prepared may still be alive."""
    done = subprocess.run([sys.executable, "-c", FIRST_USER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("fastln.machine ")]
    assert "CPU memory: fastln keeps freed memory of large tensors for the next step, up to 3.0" in line
    assert "(the cgroup's limit); without=('arena',) or FASTLN_KEEP_PAGES=0" in line


@needs_arena
def test_asking_about_the_arena_does_not_install_it(monkeypatch):
    n_users = memory.users()
    assert why_no_arena(CPU) is None
    assert memory.users() == n_users
    assert why_no_arena(torch.device("cuda")) == "the arena is for CPU tensors, and the model is on cuda"
    monkeypatch.setattr(memory, "users", lambda: 0)
    monkeypatch.setattr(machine, "memory_limit", lambda: machine.MemoryLimit(MIB, "the cgroup's limit"))
    assert why_no_arena(CPU) == "the cgroup's limit is 1 MiB, and the arena needs 64 MiB"
    monkeypatch.setenv("FASTLN_KEEP_PAGES", "0")
    assert why_no_arena(CPU) == "FASTLN_KEEP_PAGES=0 switches it off"


def test_without_a_compiler_it_says_why_there_is_no_arena(monkeypatch):
    monkeypatch.setattr(memory, "why_not", lambda: "no C++ compiler")
    assert why_no_arena(CPU) == "no C++ compiler"


def groups(tmp_path, cgroup, mountinfo, limits):
    """Make a process's folder and the mounts of its cgroups; `limits` from paths below tmp_path to what they say."""
    (tmp_path / "cgroup").write_text(cgroup)
    (tmp_path / "mountinfo").write_text(mountinfo.format(tmp=tmp_path))
    for name, limit in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{limit}\n")
    return memory_limit(tmp_path)


V1 = "30 31 0:29 / {tmp}/cpu rw - cgroup cgroup rw,cpu\n"
V1 += "31 31 0:29 / {tmp}/memory rw,noexec shared:9 - cgroup x rw,memory\n"
V2 = "32 31 0:30 / {tmp}/unified rw - cgroup2 cgroup2 rw\n"
NO_LIMIT_V1 = 9223372036854771712


@pytest.mark.parametrize(
    ("cgroup", "mountinfo", "limits", "expected"),
    [
        ("0::/a/b\n", V2, {"unified/a/b/memory.max": 5 * MIB, "unified/a/memory.max": "max"}, 5 * MIB),
        ("0::/a/b\n", V2, {"unified/a/b/memory.max": "max", "unified/a/memory.max": 4 * MIB}, 4 * MIB),
        ("0::/\n", V2, {"unified/memory.max": 3 * MIB}, 3 * MIB),
        ("0::/a\n", V2, {"unified/a/memory.max": "max"}, None),
        (
            "9:cpu,memory:/a\n8:cpu:/b\n0::/\n",
            V1 + V2,
            {
                "memory/a/memory.limit_in_bytes": 6 * MIB,
                "memory/memory.limit_in_bytes": NO_LIMIT_V1,
                "cpu/b/memory.limit_in_bytes": MIB,
            },
            6 * MIB,
        ),
        ("9:memory:/a\n", V1, {"memory/a/memory.limit_in_bytes": NO_LIMIT_V1}, None),
        # A container that sees its own group as the mount's root, whose path is told as the host has it.
        (
            "9:memory:/docker/1\n",
            V1.replace(" / {tmp}/memory", " /docker/1 {tmp}/memory"),
            {"memory/memory.limit_in_bytes": 7 * MIB},
            7 * MIB,
        ),
        ("9:memory:/docker/1\n", V1, {"memory/memory.limit_in_bytes": 8 * MIB}, 8 * MIB),
        ("0::/../other\n", V2, {"unified/memory.max": 9 * MIB}, 9 * MIB),
        ("9:memory:/a\n", "", {}, None),
    ],
)
def test_the_limit_of_a_cgroup(tmp_path, cgroup, mountinfo, limits, expected):
    limit = groups(tmp_path, cgroup, mountinfo, limits)
    physical = psutil.virtual_memory().total
    assert limit.n_bytes == (expected or physical)
    assert limit.source == ("the cgroup's limit" if expected else "the machine's memory")


def test_a_machine_without_cgroups(tmp_path):
    assert memory_limit(tmp_path).n_bytes == psutil.virtual_memory().total


def test_this_machine_has_a_limit():
    assert 0 < memory_limit().n_bytes <= psutil.virtual_memory().total


def test_half_of_what_ulimit_leaves(monkeypatch):
    used = psutil.Process().memory_info().vms
    monkeypatch.setattr(resource, "getrlimit", lambda which: (used + 2 * GIB, resource.RLIM_INFINITY))
    monkeypatch.setattr(machine, "memory_limit", lambda: machine.MemoryLimit(64 * GIB, "the machine's memory"))
    limit = arena_limit()
    assert limit.source == "half of what ulimit -v leaves"
    assert 0.9 * GIB < limit.n_bytes < 1.1 * GIB
    monkeypatch.setattr(machine, "memory_limit", lambda: machine.MemoryLimit(MIB, "the cgroup's limit"))
    assert arena_limit().source == "the cgroup's limit"
    monkeypatch.setattr(resource, "getrlimit", lambda which: (used, resource.RLIM_INFINITY))
    assert arena_limit().n_bytes < 100 * MIB

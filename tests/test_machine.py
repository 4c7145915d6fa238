"""What the machine has: here, that freed memory is kept for the next step."""

import os
import subprocess
import sys

import pytest

from fastln.machine import keep_pages
from fastln_kernels.cpu import library, memory
from fastln_kernels.cpu.library import KernelsUnavailableError

FAULTS = """
import resource, torch
from fastln.machine import keep_pages
keep_pages()
def step():
    for n in (1 << 20, 1 << 26, 1 << 24):  # 4 MiB, 256 MiB, 64 MiB
        torch.empty(n).fill_(1.0)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or not library.compiler(), reason="no Linux, or no compiler")
def test_memory_that_was_freed_is_not_mapped_again():
    def faults(keep):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS],
            env={**os.environ, "FASTLN_KEEP_PAGES": keep},
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout)

    assert faults("1") < 100
    assert faults("0") > 1000  # 80,000 pages of 4 KiB, or a 512th part of that where the kernel has huge ones


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("FASTLN_KEEP_PAGES", "0")
    assert keep_pages() == "as the C library pleases (FASTLN_KEEP_PAGES=0)"


def test_without_a_compiler_torch_s_own_allocator_stays_and_it_says_so(monkeypatch):
    def fail():
        raise KernelsUnavailableError("no C++ compiler")

    monkeypatch.setattr(memory, "keep", fail)
    assert keep_pages() == "as the C library pleases (no C++ compiler)"

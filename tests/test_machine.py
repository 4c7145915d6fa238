"""What the machine has: here, that freed memory is kept for the next step."""

import os
import subprocess
import sys

import pytest

from fastln.machine import keep_pages

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

# Frees 5 GiB at the heap's end, which nothing has touched, and tells what the heap lost.
LOSS = """
import ctypes
from fastln.machine import keep_pages
keep_pages()
malloc, free, sbrk = (getattr(ctypes.CDLL(None), name) for name in ("malloc", "free", "sbrk"))
malloc.restype = sbrk.restype = ctypes.c_void_p
malloc.argtypes, free.argtypes, sbrk.argtypes = [ctypes.c_size_t], [ctypes.c_void_p], [ctypes.c_ssize_t]
block = malloc(5 << 30)
end = sbrk(0)
free(block)
print(end - sbrk(0))
"""


@pytest.mark.skipif("glibc" not in keep_pages(), reason="only glibc has the switches")
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


@pytest.mark.skipif("glibc" not in keep_pages(), reason="only glibc has the switches")
def test_the_heap_s_end_stays_however_much_is_free_there():
    done = subprocess.run([sys.executable, "-c", LOSS], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 0


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("FASTLN_KEEP_PAGES", "0")
    assert "FASTLN_KEEP_PAGES=0" in keep_pages.__wrapped__()

"""Compiling, caching and doing without."""

import ctypes
import logging
import multiprocessing
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastln import ops
from fastln.ops.backends import resolve
from fastln.ops.settings import OpSettings
from fastln_kernels.cpu import library

COMPILER = library.compiler()
needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
SOURCE = 'extern "C" void answer(int* to) { *to = 42; }'  # compiles in no time


def forget():
    for function in (library.load, library.why_not, resolve):
        function.cache_clear()
    library._told.clear()


@pytest.fixture(autouse=True)
def _forget():
    forget()
    yield
    forget()


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(monkeypatch, tmp_path, cache):
    (tmp_path / "sources").mkdir()
    monkeypatch.setattr(library, "SOURCES", tmp_path / "sources")
    path = tmp_path / "sources" / "small.cpp"
    path.write_text(SOURCE)
    return path


def answer():
    library.load.cache_clear()
    found = ctypes.c_int()
    library.function("small", "answer", [ctypes.c_void_p])(ctypes.byref(found))
    return found.value


def said(caplog, words):
    return sum(words in record.getMessage() for record in caplog.records if record.name == "fastln")


@needs_compiler
def test_the_first_use_compiles_and_says_so_and_the_next_is_silent(source, cache, caplog):
    assert answer() == 42
    assert said(caplog, f"compiling fastln's CPU kernels (small.cpp), once for this machine, into {cache}") == 1
    assert [path.suffix for path in cache.iterdir()] == [".so"]
    caplog.clear()
    assert answer() == 42
    assert not caplog.records


@needs_compiler
@pytest.mark.parametrize("change", ["source", "header", "flags"])
def test_a_change_is_compiled_again(source, cache, caplog, monkeypatch, change):
    assert answer() == 42
    if change == "source":
        source.write_text(SOURCE.replace("42", "43"))
    elif change == "header":
        source.with_name("new.h").write_text("")
    else:
        monkeypatch.setattr(library, "_FLAGS", (*library._FLAGS, "-DNEW"))
    assert answer() == (43 if change == "source" else 42)
    assert said(caplog, "compiling") == 2
    assert [path.suffix for path in cache.iterdir()] == [".so", ".so"]


@needs_compiler
@pytest.mark.parametrize("name", sorted(path.stem for path in library.SOURCES.glob("*.cpp")))
def test_our_sources_compile_without_a_warning(name, monkeypatch):
    monkeypatch.setenv("FASTLN_CPU_WARNINGS", "1")
    assert library._build(name).exists()  # in the usual cache, so that only what changed is compiled


@needs_compiler
def test_a_warning_is_an_error_where_asked_for_and_else_in_the_log_at_debug(source, caplog, monkeypatch):
    source.write_text(SOURCE.replace("{", "{ int unused;"))
    monkeypatch.setenv("FASTLN_CPU_WARNINGS", "1")
    with pytest.raises(library.KernelsUnavailableError, match=r"1 compiler warnings, the first: .*small\.cpp.*unused"):
        library._build("small")
    assert not list(library.cache_directory().glob("*.so"))
    monkeypatch.delenv("FASTLN_CPU_WARNINGS")
    source.write_text('#warning "mind the step"\n' + SOURCE)
    with caplog.at_level(logging.DEBUG, logger="fastln"):
        assert answer() == 42
    (record,) = [record for record in caplog.records if record.levelno == logging.DEBUG]
    assert "the compiler says about small.cpp:" in record.getMessage()
    assert "mind the step" in record.getMessage()


@needs_compiler
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_processes_that_compile_at_once_do_no_harm(source, cache):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        made = pool.map(library._build, ["small"] * 3)
    assert len(set(made)) == 1
    assert list(cache.iterdir()) == made[:1]
    assert answer() == 42


@needs_compiler
@pytest.mark.parametrize("fault", ["source", "compiler", "cache", "library"])
def test_a_failure_is_one_warning_and_an_error_that_says_why(source, cache, caplog, monkeypatch, fault):
    if fault == "source":
        source.write_text("this is not C++")
    elif fault == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif fault == "cache":
        cache.write_text("a file")
    else:
        library._build("small").write_text("half a library")
    why = {"source": "error: ", "compiler": "no-such-compiler", "cache": str(cache), "library": str(cache)}[fault]
    with pytest.raises(library.KernelsUnavailableError, match=why):
        library.load("small")
    assert said(caplog, "small on CPUs, and all else that fails alike, runs without compiled kernels") == 1
    assert why in library.why_not("small")


@pytest.mark.parametrize("without", ["switch", "compiler"])
def test_everything_works_without_compiled_kernels(caplog, monkeypatch, without):
    name, value = ("FASTLN_CPU_KERNELS", "0") if without == "switch" else ("CXX", "no-such-compiler")
    monkeypatch.setenv(name, value)
    x = torch.randn(4, 8, requires_grad=True)
    for y in (ops.layer_norm(x, None, None), ops.rms_norm(x, torch.ones(8)), ops.activation(x, "gelu")):
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
    for op in ("layer_norm", "rms_norm", "dropout_add_norm", "activation", "gated_activation"):
        for requested in ("auto", "cpu"):
            choice = resolve(op, x.device, OpSettings(requested))
            has_another = op in ("layer_norm", "activation")
            assert choice.backend == ("cpu" if has_another else "reference")
            assert (name if without == "switch" else value) in choice.reason
    # Whoever switches them off knows; else one line for norms and activations, which fail alike.
    assert said(caplog, "so steps are slower") == (0 if without == "switch" else 1)
    assert all(record.levelno == logging.WARNING for record in caplog.records if record.name == "fastln")


@needs_compiler
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_one_openmp_runtime_in_the_process_and_no_more_threads_than_torch_has():
    program = """
import os, torch
torch.set_num_threads(2)
from fastln_kernels.cpu import native_norm
from fastln_kernels.reference import NormForward, NormKind
x, before = torch.randn(2000, 256), len(os.listdir("/proc/self/task"))
native_norm.norm_forward(NormForward(x, None, None, NormKind(1e-5)))
files = {line.split()[-1] for line in open("/proc/self/maps")}
print(sum("omp" in file.rpartition("/")[2] for file in files), len(os.listdir("/proc/self/task")) - before)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["1", "1"]


@needs_compiler
@pytest.mark.slow(pool="large")
@pytest.mark.timeout(900)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names are those of x86")
@pytest.mark.parametrize("architecture", ["x86-64", "haswell", "skylake-avx512"])
def test_kernels_for_narrower_vectors(architecture):
    flags = (Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else "").split()
    if {"haswell": "avx2", "skylake-avx512": "avx512bw"}.get(architecture, "fpu") not in flags:
        pytest.skip(f"this processor cannot run code for {architecture}")
    files = [
        str(Path(__file__).with_name(f"test_native_{name}.py")) for name in ("norm", "activation", "codes", "dropout")
    ]
    left_out = ("-k", "not step_of_rows and not every_16_bit_number")  # which take longest
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", *left_out, *files]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "FASTLN_CPU_ARCH": architecture}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    assert " skipped" not in done.stdout

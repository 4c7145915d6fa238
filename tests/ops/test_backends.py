"""Which backend an operation runs on."""

import builtins
import importlib

import pytest
import torch

from fastln.errors import FastLNError
from fastln.ops import backends
from fastln.ops.backends import OPERATIONS, resolve
from fastln.ops.settings import BACKENDS, DEFAULT, OpSettings
from fastln_kernels.cpu import products

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _forget():
    resolve.cache_clear()
    yield
    resolve.cache_clear()


@pytest.fixture
def no_triton(monkeypatch):
    def import_module(name):
        if name == "triton":
            raise ImportError("No module named 'triton'")
        return builtins.__import__(name)

    monkeypatch.setattr(importlib, "import_module", import_module)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("device", [CPU, CUDA, torch.device("mps"), torch.device("meta")], ids=str)
def test_auto_always_finds_one_and_says_why(op, device):
    choice = resolve(op, device, DEFAULT)
    assert choice.backend in set(BACKENDS) - {"auto"}
    assert choice.reason


def test_auto_takes_the_fastest_of_the_device():
    assert resolve("layer_norm", CPU, DEFAULT).backend == "cpu"
    assert resolve("layer_norm", CUDA, DEFAULT).backend == "triton"
    assert resolve("attention", CUDA, DEFAULT).backend == "reference"


def test_attention_says_what_serves_without_compiled_kernels(monkeypatch):
    monkeypatch.setattr(products, "why_not", lambda name: "no compiler")
    choice = resolve("attention", CPU, DEFAULT)
    assert choice.backend == "cpu"
    assert "scaled_dot_product_attention" in choice.reason
    assert "no compiler" in choice.reason


def test_without_triton_auto_says_so(no_triton):
    choice = resolve("layer_norm", CUDA, DEFAULT)
    assert choice.backend == "reference"
    assert "No module named 'triton'" in choice.reason


def test_without_triton_asking_for_it_fails(no_triton):
    with pytest.raises(FastLNError, match="cannot be imported"):
        resolve("layer_norm", CUDA, OpSettings("triton"))


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    assert resolve("layer_norm", CPU, OpSettings("triton")).backend == "triton"
    resolve.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(FastLNError, match="TRITON_INTERPRET=1"):
        resolve("layer_norm", CPU, OpSettings("triton"))


def test_a_backend_that_the_operation_lacks_is_as_good_as_auto():
    choice = resolve("attention", CPU, OpSettings("triton"))
    assert choice.backend == resolve("attention", CPU, DEFAULT).backend
    assert "attention has no triton backend" in choice.reason


def test_cpu_kernels_that_cannot_run_are_the_reason_also_if_asked_for(monkeypatch):
    monkeypatch.setattr(backends, "_no_library", lambda kernels: "no C++ compiler")
    choice = resolve("int8_linear", CPU, OpSettings("cpu"))
    assert choice.backend == "reference"
    assert choice.reason == (
        "plain PyTorch, slowly, so prepare() keeps products exact in its place; no compiled CPU kernels: "
        "no C++ compiler"
    )
    assert choice.lacks == "no compiled CPU kernels: no C++ compiler"


def test_what_is_left_is_not_called_the_fastest(monkeypatch):
    assert resolve("linear", CUDA, DEFAULT).reason == "torch's linear, the fastest for device 'cuda'"
    monkeypatch.setattr(backends, "_no_library", lambda kernels: "no C++ compiler")
    choices = {op: resolve(op, CPU, DEFAULT) for op in OPERATIONS}
    left = {op for op, choice in choices.items() if choice.backend == "reference"}
    assert {"linear", "rms_norm", "int8_linear"} <= left
    assert {op for op, choice in choices.items() if "the fastest" not in choice.reason} == left
    assert choices["linear"].reason == "torch's linear, all that runs here; no compiled CPU kernels: no C++ compiler"


def test_a_processor_without_units_for_8_bits_is_not_said_to_lack_kernels(monkeypatch):
    monkeypatch.setattr(backends, "_no_library", lambda kernels: products.NO_INT8)
    assert resolve("int8_linear", CPU, DEFAULT).lacks == products.NO_INT8


def test_cpu_backend_on_a_gpu_fails():
    with pytest.raises(FastLNError, match="CPU tensors only"):
        resolve("layer_norm", CUDA, OpSettings("cpu"))


def test_the_choice_is_made_once(monkeypatch):
    resolve("layer_norm", CPU, DEFAULT)
    monkeypatch.setattr(backends, "_obstacle", None)
    assert resolve("layer_norm", CPU, DEFAULT).backend == "cpu"

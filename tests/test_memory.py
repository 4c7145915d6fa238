"""The count of what is saved for backward, on graphs small enough to count by hand; and the peak of a process."""

import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

from fastln.memory import SavedActivations


def test_a_chain_of_known_tensors():
    x = torch.randn(10, 100, requires_grad=True)
    with SavedActivations(nn.Module()) as saved:
        y = x.exp()  # saves its result: 4,000 bytes
        z = y.sin()  # saves its input: the same storage
        z.cos().sum()  # saves z: another 4,000
    assert saved.bytes == 8000


def test_parameters_and_buffers_do_not_count():
    model = nn.Sequential(nn.Linear(30, 20, bias=False), nn.Linear(20, 5, bias=False))
    model.register_buffer("scale", torch.randn(5))
    x = torch.randn(7, 30)
    with SavedActivations(model) as saved:
        loss = (model(x) * model.scale).sum()
    # Weight gradients need the inputs: x (7 x 30) and the hidden layer (7 x 20); the product with the buffer saves
    # the buffer alone, as the buffer itself needs no gradient.
    assert saved.bytes == 4 * (7 * 30 + 7 * 20)
    loss.backward()
    assert model[0].weight.grad is not None


def test_frozen_layers_save_nothing():
    model = nn.Linear(30, 20).requires_grad_(False)
    x = torch.randn(7, 30, requires_grad=True)
    with SavedActivations(model) as saved:
        model(x)
    assert saved.bytes == 0


def test_views_count_once_and_as_the_whole_storage():
    x = torch.randn(100, requires_grad=True)
    y = x * 1.0
    with SavedActivations(nn.Module()) as saved:
        y[:10].sin()
        y[50:].sin()
    assert saved.bytes == 400


def test_a_graph_that_was_counted_is_freed_with_its_last_tensor():
    x = torch.randn(100, requires_grad=True)
    with SavedActivations(nn.Module()):
        y = x.exp()  # saves its own result
    gone = weakref.ref(y)
    del y
    assert gone() is None


def test_what_is_counted_still_gives_its_gradients():
    x = torch.randn(100, requires_grad=True)
    with SavedActivations(nn.Module()):
        y = x.exp().sin().sum()
    (gradient,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(gradient, x.exp().cos() * x.exp())


def test_only_what_is_saved_inside_the_context_counts():
    x = torch.randn(100, requires_grad=True)
    saved = SavedActivations(nn.Module())
    x.exp()
    with saved:
        pass
    x.exp()
    assert saved.bytes == 0


PEAKS = """
import torch
from fastln.memory import peak_bytes, reset_peak
cpu = torch.device("cpu")
reset_peak(cpu)
print(peak_bytes(cpu))
torch.ones(64 * 2**20)  # gone at once
print(peak_bytes(cpu))
reset_peak(cpu)
print(peak_bytes(cpu))
"""


def test_peak_sees_memory_that_is_gone_and_forgets_what_was_before():
    # In a process of its own: this one may keep what other tests have freed.
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    before, during, after = map(int, done.stdout.split())
    assert during - before == pytest.approx(256 * 2**20, rel=0.1)
    assert after < during - 128 * 2**20

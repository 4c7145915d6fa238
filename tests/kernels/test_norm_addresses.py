"""Tensors of more elements than 32 bits count, in sparse files: gigabytes of addresses, a few pages of disk."""

import dataclasses

import pytest
import torch
from norm_bounds import ALL, LAYER_NORM, PROLOGUES, assert_close, backward, check, forward, inputs, storage_bound
from triton.runtime.interpreter import interpreter_builder

from fastln_kernels import launch, norm, reference


@pytest.fixture
def sparse(tmp_path):
    """Makes tensors whose untouched parts are holes of a file."""
    n_files = 0

    def empty(shape, *, dtype, device="cpu"):
        nonlocal n_files
        n_files += 1
        size = torch.Size(shape).numel()
        return torch.from_file(str(tmp_path / str(n_files)), shared=True, size=size, dtype=dtype).view(shape)

    return empty


@pytest.mark.slow(take=4)
@pytest.mark.parametrize("either_width", [(16,), (300, "wide")], indirect=True, ids=str)
@pytest.mark.parametrize("which", ["x", "residual", "dy", "dstream"])
def test_row_strides_beyond_the_reach_of_32_bits(which, either_width, sparse):
    stride, n_cols = 2**30, either_width
    given = inputs(4, n_cols, torch.bfloat16)
    far = sparse((3 * stride + n_cols,), dtype=torch.bfloat16).as_strided((4, n_cols), (stride, 1))
    far.copy_(getattr(given, which))
    setattr(given, which, far)
    check(given, [ALL, (False, True, True)])
    check(given, [ALL], prologue=PROLOGUES["no dropout"])


class LastProgram:
    """A kernel of whose programs the last alone runs."""

    def __init__(self, kernel, monkeypatch):
        self.kernel, self.monkeypatch = kernel, monkeypatch

    def __getitem__(self, grid):
        def run(*args, **kwargs):
            with self.monkeypatch.context() as patch:
                patch.setattr(interpreter_builder, "set_grid_idx", lambda *_: None)
                patch.setattr(interpreter_builder, "set_grid_dim", lambda *_: None)
                patch.setattr(interpreter_builder, "grid_dim", (*grid, 1, 1))
                patch.setattr(interpreter_builder, "grid_idx", (grid[0] - 1, 0, 0))
                self.kernel[(1,)](*args, **kwargs)

        return run


@pytest.mark.parametrize("either_width", [(1024,), (1024, "wide")], indirect=True, ids=str)
def test_the_last_of_more_elements_than_32_bits_count(either_width, sparse, monkeypatch):
    n_rows, n_cols, dtype, prologue = 2**21 + 1, either_width, torch.bfloat16, PROLOGUES["no dropout"]
    monkeypatch.setattr(norm.torch, "empty", sparse)
    monkeypatch.setattr(launch, "sm_count", lambda device: n_rows)  # so that the last program has the last row alone
    for kernel in ("forward_kernel", "forward_wide_kernel", "backward_kernel", "backward_wide_kernel"):
        monkeypatch.setattr(norm, kernel, LastProgram(getattr(norm, kernel), monkeypatch))
    last = inputs(1, n_cols, dtype)
    given = dataclasses.replace(last)
    for name in ("x", "residual", "dy", "dstream"):
        rows = sparse((n_rows, n_cols), dtype=dtype)
        rows[-1:] = getattr(last, name)
        setattr(given, name, rows)
    got = forward(norm, given, LAYER_NORM, prologue)
    want = forward(reference, last.double(), LAYER_NORM, prologue)
    assert_close(got.stream[-1:], want.stream, storage_bound(dtype), scale=last.x.abs() + last.residual.abs())
    assert_close(got.y[-1:], want.y, 2 * storage_bound(dtype) + 1e-6)
    result = backward(norm, given, got.stream, got.rstd, LAYER_NORM, prologue, (True, False, False))
    kept = got.stream[-1:].double()
    right = backward(reference, last.double(), kept, got.rstd[-1:].double(), LAYER_NORM, prologue, (True, False, False))
    for gradient in (result.dx, result.dresidual):
        assert_close(gradient[-1:], right.dx, storage_bound(dtype) + 1e-6, scale=right.dx.abs() + last.dstream.abs())

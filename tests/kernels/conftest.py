"""For the norm kernels: buffers that show what is written outside of them; the way of wide rows for narrow ones."""

import math

import pytest
import torch
from norm_bounds import take_the_wide_way

from fastln_kernels import norm

GUARD = 64


@pytest.fixture
def guarded_buffers(monkeypatch):
    """Every tensor the launching functions allocate starts as NaN and lies between NaN bands that must survive.

    In 8 bits, which have no NaN, -128 serves, which no kernel writes; in bytes of codes one of their many values.
    """
    bands = []
    others = {torch.int8: -128, torch.uint8: 0xA5}

    def empty(shape, *, dtype, device):
        n = math.prod(shape)
        around = torch.full((n + 2 * GUARD,), others.get(dtype, math.nan), dtype=dtype, device=device)
        bands.extend((around[:GUARD], around[GUARD + n :]))
        return around[GUARD : GUARD + n].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(norm.torch, "empty", empty)
        yield
    untouched = ((band == others[band.dtype]) if band.dtype in others else band.isnan() for band in bands)
    assert all(band.all() for band in untouched), "written outside of a buffer"


@pytest.fixture
def wide(monkeypatch):
    take_the_wide_way(monkeypatch)


@pytest.fixture
def either_width(request):
    """Number of columns, and `wide` where the test's parameter names it."""
    n_cols, *fixtures = request.param
    for name in fixtures:
        request.getfixturevalue(name)
    return n_cols

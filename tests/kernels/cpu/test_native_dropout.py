"""The compiled dropout against its definition: the same elements dropped, the others scaled and rounded alike."""

import math

import pytest
import torch

from fastln_kernels import reference
from fastln_kernels.cpu import library, native_dropout

pytestmark = pytest.mark.skipif(library.why_not("dropout") is not None, reason=f"{library.why_not('dropout')}")

SEED = torch.tensor([-(2**63) + 0x123456789ABCDEF])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("p", [0.0, 2.0**-16, 0.1, 0.5, 0.99999])
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1), (37, 1), (7, 63), (9, 65), (1, 20000), (1031, 17)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_definition_bit_for_bit(dtype, shape, p):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = native_dropout.dropout(x, p, SEED)
    assert got.is_contiguous()
    assert torch.equal(got, reference.dropout(x, p, SEED))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["row stride", "transposed", "every other column", "one row", "one number"])
def test_any_strides(layout, dtype):
    strided = {
        "row stride": lambda t: torch.cat((t, torch.full_like(t, math.nan)), -1)[:, :70],
        "transposed": lambda t: t.T.contiguous().T,
        "every other column": lambda t: torch.stack((t, torch.full_like(t, math.nan)), -1)[..., 0],
        "one row": lambda t: t[:1].expand(9, 70),
        "one number": lambda t: t[:1, :1].expand(9, 70),
    }[layout]
    x = strided(torch.randn(9, 70, generator=torch.Generator().manual_seed(0)).to(dtype))
    assert torch.equal(native_dropout.dropout(x, 0.3, SEED), reference.dropout(x.contiguous(), 0.3, SEED))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_passes_where_it_is_kept_and_is_0_where_it_is_dropped(dtype):
    x = torch.full((40, 50), math.nan, dtype=dtype)
    x[::2] = math.inf
    got, keep = native_dropout.dropout(x, 0.4, SEED), reference.dropout_keep(40, 50, 0.4, SEED)
    assert got[~keep].eq(0).all()
    torch.testing.assert_close(got[keep], x[keep], equal_nan=True)

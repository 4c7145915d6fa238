"""The products of blocks that compiled kernels take from torch."""

import pytest
import torch

from fastln_kernels.cpu import library, products

pytestmark = pytest.mark.skipif(library.why_not("attention") is not None, reason=f"{library.why_not('attention')}")


@pytest.fixture(autouse=True)
def fresh():
    products.usable.cache_clear()
    products.why_not.cache_clear()
    yield
    products.usable.cache_clear()
    products.why_not.cache_clear()


def test_without_torch_s_products_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(products, "_RELEASE", "nothing_of_this_name")
    assert "does not export its block products" in products.why_not("attention")


def test_what_is_usable_is_what_the_processor_multiplies():
    if products.why_not("attention") is not None:
        pytest.skip(products.why_not("attention"))
    assert torch.float32 in products.usable("attention") <= {torch.float32, torch.bfloat16}

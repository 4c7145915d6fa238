"""The products of blocks that compiled kernels take from torch, and what happens without them."""

import pytest
import torch
from torch.nn import functional

from fastln import doctor, ops
from fastln.ops.backends import resolve
from fastln.ops.settings import DEFAULT, OpSettings
from fastln_kernels.cpu import library, products

pytestmark = pytest.mark.skipif(library.why_not("attention") is not None, reason=f"{library.why_not('attention')}")


CACHED = (products._taken, products.why_not, products._warn, resolve)


@pytest.fixture(autouse=True)
def fresh():
    for cached in CACHED:
        cached.cache_clear()
    yield
    for cached in CACHED:
        cached.cache_clear()


@pytest.mark.parametrize("name", ["_BRGEMM_BFLOAT16", "_BRGEMM_FLOAT32", "_RELEASE"])
def test_without_torch_s_products_one_line_says_so_and_torch_serves(monkeypatch, caplog, name):
    monkeypatch.setattr(products, name, "nothing_of_this_name")
    for settings in (DEFAULT, OpSettings("cpu"), OpSettings("triton")):
        for op in ("attention", "linear"):
            choice = resolve(op, torch.device("cpu"), settings)
            assert "nothing_of_this_name" in choice.reason
            assert choice.module != f"cpu.native_{op}"
    q, k, v = (torch.randn(2, 3, 40, 16, requires_grad=True) for _ in range(3))
    out = ops.attention(q, k, v)
    assert torch.equal(out, functional.scaled_dot_product_attention(q, k, v))
    ops.attention(q, k, v, dropout=0.1).sum().backward()
    assert q.grad.isfinite().all()
    x, weight = torch.randn(40, 64), torch.randn(32, 64)
    assert torch.equal(ops.linear(x, weight), functional.linear(x, weight))
    assert [record.levelname for record in caplog.records if record.name == "fastln"] == ["WARNING"]
    assert (
        "attention and frozen linear layers and frozen linear layers in 8 bits run on torch's own code" in caplog.text
    )
    assert "does not export its block products" in caplog.text


def test_doctor_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(products, "_RELEASE", "nothing_of_this_name")
    if torch.cuda.is_available():
        pytest.skip("doctor tells of the GPU's operations")
    operations = doctor.examine()["operations"]
    assert "nothing_of_this_name" in operations["attention"]["reason"]
    assert "nothing_of_this_name" in operations["linear"]["reason"]


def test_what_is_usable_is_what_the_processor_multiplies():
    if products.why_not("attention") is not None:
        pytest.skip(products.why_not("attention"))
    assert torch.float32 in products.usable("attention") <= {torch.float32, torch.bfloat16}

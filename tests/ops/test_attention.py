import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastln.errors import FastLNError
from fastln.ops import attention
from fastln.ops.attention import SWITCH, _why_exact_here, has_own, why_exact
from fastln.ops.backends import resolve
from fastln.ops.settings import DEFAULT, REFERENCE, OpSettings
from fastln_kernels import reference_attention
from fastln_kernels.cpu import products, units
from fastln_kernels.reference_attention import AttentionBackward, AttentionForward

WHY_NOT = products.why_not("attention")
needs_kernels = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@pytest.fixture(params=[pytest.param("native", marks=needs_kernels), "reference"], autouse=True)
def implementation(request, monkeypatch):
    """Both ways that `attention` has of its own."""
    for cached in (resolve, _why_exact_here):
        cached.cache_clear()
    if request.param == "reference":
        monkeypatch.setattr(products, "why_not", lambda name: "for a test")
    yield request.param
    for cached in (resolve, _why_exact_here):
        cached.cache_clear()


def make(dtype=torch.bfloat16, n=3, b=2, h=3, n_tokens=17, dim=8, seed=0):
    """n tensors (B, H, S, D) laid out as models make them: views of (B, S, H, D)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, n_tokens, h, dim, generator=generator).to(dtype).transpose(1, 2) for _ in range(n)]


def wanting(tensors, wanted=(0, 1, 2)):
    return [x.detach().requires_grad_(i in wanted) for i, x in enumerate(tensors)]


def saved_by(function, *arguments):
    """The result, and the storages that it keeps for backward."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        return function(*arguments), list(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": torch.ones(17, 17, dtype=torch.bool).tril()}])
def test_is_torch_s_attention(dtype, options):
    leaves, (*_, dout) = wanting(make(dtype)), make(dtype, 4)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = F.scaled_dot_product_attention(*wide, options.get("mask"), is_causal=options.get("causal", False))
    out = attention(*leaves, **options)
    wanted = torch.autograd.grad(exact, wide, dout.double())
    for actual, expected in zip((out, *torch.autograd.grad(out, leaves, dout)), (exact.detach(), *wanted), strict=True):
        assert (actual.double() - expected).norm() < 2 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("masked", [False, True])
def test_keeps_inputs_output_and_a_number_per_row(dropout, masked, implementation):
    q, k, v = wanting(make())
    mask = torch.ones(17, 17, dtype=torch.bool).tril() if masked else None
    if implementation == "reference" and not dropout:
        assert not has_own(q, k, v, mask=mask, dropout=dropout), "torch's own attention serves"
        return
    out, kept = saved_by(lambda: attention(q, k, v, mask=mask, dropout=dropout))
    kept = {x.untyped_storage().data_ptr(): x for x in kept}
    for x in (q, k, v, out, *([mask] if masked else [])):
        del kept[x.untyped_storage().data_ptr()]
    sizes = {(tuple(x.shape), x.dtype) for x in kept.values()}
    assert sizes == {((2, 3, 17), torch.float32), *({((1,), torch.int64)} if dropout else ())}


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_demand(wanted):
    """Any subset of gradients; what only the others need is not kept."""
    *tensors, dout = make(n=4)
    torch.manual_seed(0)
    complete = wanting(tensors)
    expected = torch.autograd.grad(attention(*complete, dropout=0.2), complete, dout)
    torch.manual_seed(0)
    some = wanting(tensors, wanted)
    out, kept = saved_by(lambda: attention(*some, dropout=0.2))
    kept = {x.untyped_storage().data_ptr() for x in kept}
    for x in (some[2], out):
        assert (x.untyped_storage().data_ptr() in kept) == (wanted != (2,))
    out.backward(dout)
    for i, x in enumerate(some):
        assert (x.grad is not None) == (i in wanted)
        assert i not in wanted or torch.equal(x.grad, expected[i])


def test_without_gradients_nothing_is_kept():
    out, kept = saved_by(lambda: attention(*make(), dropout=0.2))
    assert not kept
    assert not out.requires_grad


def test_dropout_is_drawn_from_torch_s_generator():
    q, k, v = make()
    torch.manual_seed(3)
    first = attention(*wanting((q, k, v)), dropout=0.5)
    second = attention(*wanting((q, k, v)), dropout=0.5)
    torch.manual_seed(3)
    assert torch.equal(first, attention(*wanting((q, k, v)), dropout=0.5))
    assert not torch.equal(first, second)


def test_checkpointing_draws_the_same_numbers_again():
    *tensors, dout = make(n=4)
    gradients = []
    for wrap in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=False)):
        torch.manual_seed(0)
        leaves = wanting(tensors)
        out = wrap(lambda q, k, v: attention(q, k, v, dropout=0.3), *leaves)
        torch.manual_seed(99)  # what else draws between forward and backward
        gradients.append(torch.autograd.grad(out, leaves, dout))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_gradient_with_dropout_is_that_of_the_function():
    """Finite differences in float64, along one direction, with the same numbers drawn."""
    leaves = wanting(make(torch.float64, n_tokens=5))
    (dout,) = make(torch.float64, 1, n_tokens=5, seed=1)

    def value(*tensors):
        torch.manual_seed(0)
        return (attention(*tensors, dropout=0.3) * dout).sum()

    gradients = torch.autograd.grad(value(*leaves), leaves)
    directions = make(torch.float64, n_tokens=5, seed=2)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)).item()
    values = [value(*(x + step * d for x, d in zip(leaves, directions, strict=True))).item() for step in (1e-6, -1e-6)]
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-7)


def test_who_serves(implementation, monkeypatch):
    q, k, v = make()
    mask = torch.zeros(17, 17, dtype=torch.bfloat16)
    native = implementation == "native"

    def own(q=q, k=k, v=v, mask=None, dropout=0.0):
        return has_own(q, k, v, mask=mask, dropout=dropout)

    assert own() == native
    assert not own(q[:, :, :1])
    q.requires_grad_()
    assert own() == own(q[:, :, :1]) == own(mask=mask) == native
    assert own(dropout=0.1)
    assert own(q.float(), k.float(), v.float()) == native
    assert not own(q.double(), k.double(), v.double())
    assert own(q.double(), k.double(), v.double(), dropout=0.1)
    assert not own(mask=mask.clone().requires_grad_(), dropout=0.1)
    assert not own(v=v.float(), dropout=0.1)
    assert not own(k=k[:, :2], v=v[:, :2], dropout=0.1)
    assert not own(q.detach().to("meta").requires_grad_(), dropout=0.1)
    with torch.no_grad():
        assert own(dropout=0.1) == native
    with torch.backends.mkldnn.flags(enabled=False):
        assert not own()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_meta_tensors_go_the_way_of_cpu_tensors(implementation, dropout):
    """So what a plan stores can be counted on a model without values."""
    saved = []
    for device in ("cpu", "meta"):
        q, k, v = (x.to(device).requires_grad_() for x in make())
        assert has_own(q, k, v, mask=None, dropout=dropout) == (implementation == "native" or dropout > 0)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved[-1].append((x.shape, x.dtype)), lambda x: x):
            saved.append([])
            out = attention(q, k, v, dropout=dropout)
        assert out.device.type == device
    if implementation == "native" or dropout:  # else torch's own serves
        assert saved[0] == saved[1]


def test_the_reference_is_torch_s_attention_and_keeps_no_mask_of_dropout():
    leaves = wanting(make(torch.float32))
    out = attention(*leaves, causal=True, settings=REFERENCE)
    assert torch.equal(out, F.scaled_dot_product_attention(*leaves, is_causal=True))
    for dropout in (0.0, 0.2):
        assert has_own(*leaves, mask=None, dropout=dropout, settings=REFERENCE) == (dropout > 0)
    _, kept = saved_by(lambda: attention(*leaves, dropout=0.2, settings=REFERENCE))
    assert max(x.numel() for x in kept) == leaves[0].numel()


def test_triton_has_no_attention_so_the_fastest_serves(implementation):
    q, k, v = wanting(make())
    assert has_own(q, k, v, mask=None, dropout=0.0, settings=OpSettings("triton")) == (implementation == "native")


def test_torch_serves_the_rest():
    q, k, v = wanting(make(torch.float32))
    bias = torch.randn(17, 17, requires_grad=True)
    out = attention(q, k, v, mask=bias)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, bias))
    assert torch.autograd.grad(out.sum(), bias)[0].isfinite().all()
    assert torch.func.grad(lambda q: attention(q, k, v).sum())(q.detach()).shape == q.shape


def test_errors():
    q, k, v = make()
    with pytest.raises(FastLNError, match="dropout is 1"):
        attention(q, k, v, dropout=1.0)
    with pytest.raises(FastLNError, match="causal attention takes no mask"):
        attention(q, k, v, causal=True, mask=torch.ones(17, 17, dtype=torch.bool))
    out = attention(*wanting((q, k, v)), dropout=0.1)
    with pytest.raises(FastLNError, match="create_graph"):
        out.sum().backward(create_graph=True)


def test_autocast_casts_as_torch_does():
    q, k, v = wanting(make(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = attention(q, k, v.bfloat16()), F.scaled_dot_product_attention(q, k, v.bfloat16())
    assert out.dtype == expected.dtype == torch.bfloat16
    assert (out - expected).float().norm() < 2 * torch.finfo(torch.bfloat16).eps * expected.float().norm()
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


@pytest.mark.slow(take=2)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("masked", [False, True])
def test_operator_contract(masked, dropout):
    q, k, v, dout = make(n=4)
    mask = torch.ones(17, 17, dtype=torch.bool).tril_() if masked else None
    rest = (mask, torch.tensor([7]) if dropout else None)
    settings = (0.3, False, dropout, *DEFAULT.flat)
    torch.library.opcheck(torch.ops.fastln.attention, (*wanting((q, k, v)), *rest, *settings))
    out, lse = torch.ops.fastln.attention(q, k, v, *rest, *settings)
    for needs in ((True, False, True), (False, True, True)):
        torch.library.opcheck(torch.ops.fastln.attention_backward, (dout, q, k, v, out, lse, *rest, *needs, *settings))


def test_compiles_in_one_graph():
    *tensors, dout = make(n=4)

    def step(q, k, v):
        return attention(q * 2, k, v, dropout=0.2) * 2

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        leaves = wanting(tensors)
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, dout)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


INT8 = OpSettings(products="int8")


def in_8_bits():
    return WHY_NOT is None and products.in_8_bits("attention")


def test_products_in_8_bits_reach_the_kernels(implementation, monkeypatch):
    """Forward, backward and the compiled operator; what is kept stays exact."""
    if implementation == "reference" or not in_8_bits():
        pytest.skip("no products in 8 bits")
    monkeypatch.setenv(SWITCH, "1")
    leaves, (*_, dout) = wanting(make(torch.float32, dim=40)), make(torch.float32, 4, dim=40)
    request = AttentionForward(*[x.detach() for x in leaves], scale=40**-0.5, causal=True, int8=True)
    right, lse = reference_attention.attention_forward(request)
    grads = reference_attention.attention_backward(AttentionBackward(request, dout, right, lse, True, True, True))
    out, kept = saved_by(lambda: attention(*leaves, causal=True, settings=INT8))
    assert {x.dtype for x in kept} == {torch.float32}
    for actual, expected in zip((out, *torch.autograd.grad(out, leaves, dout)), (right, *grads), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    exact = attention(*leaves, causal=True)
    assert 1e-4 < (out - exact).norm() / exact.norm() < 0.02
    monkeypatch.setenv(SWITCH, "0")
    assert torch.equal(attention(*leaves, causal=True, settings=INT8), exact)


def test_why_attention_stays_exact(implementation, monkeypatch):
    def why(settings=INT8, dtype=torch.bfloat16, device="cpu", **sizes):
        return why_exact(settings, torch.device(device), dtype, **sizes)

    assert why(DEFAULT) == "products are exact"
    assert "compiled kernels" in why(OpSettings("reference", products="int8"))
    assert "compiled kernels" in why(dtype=torch.float64)
    if implementation == "reference":
        assert "compiled kernels" in why()
        return
    if not in_8_bits():
        assert "no units" in why()
        return
    monkeypatch.setattr(units, "rates", lambda: {"float32": 1e11, "bfloat16": 2e11, "int8": 5e11})
    monkeypatch.setenv(units.VARIABLE, "float32")
    # Rounding a row costs as much as scaling 400 scores; a term gains 2 (1/100 - 1/500) = 0.016 ns.
    assert why(device="meta", dim=64, n_queries=44, n_keys=44) is None
    assert "under 44" in why(dim=64, n_queries=43)
    assert "under 44" in why(dim=64, n_queries=44, n_keys=43)
    assert "under 98" in why(dim=16, n_keys=97)
    monkeypatch.setattr(units, "rates", lambda: {"float32": 1e11, "bfloat16": 1.5e12, "int8": 3e12})
    assert why() is None
    monkeypatch.setenv(units.VARIABLE, "bfloat16")
    assert (
        "heads of 64 columns, units in 8 bits are too little faster here: 3000 GFLOP/s a thread, bfloat16 1500" in why()
    )
    monkeypatch.setenv(SWITCH, "1")
    assert why(dim=31, n_keys=2) is None
    monkeypatch.setenv(SWITCH, "0")
    assert why() == f"{SWITCH}=0 turns it off"
    monkeypatch.setenv(SWITCH, "yes")
    with pytest.raises(FastLNError, match="must be 0 or 1"):
        why()

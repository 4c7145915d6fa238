"""The norm kernels, interpreted, against the definition in float64; and the definition against torch.

Bounds. Errors are root-mean-square, relative to the root mean square of the result; where the result is what is left of
terms that cancel, of the terms: for dx `rstd * dy * weight` (and the stream's gradient); for a sum over rows what it
would be were the terms' signs random (the root of the sum of their squares), on top of its own size. With u = 2^-24,
the roundoff of float32:

- arithmetic: an element passes a chain of about 8 roundings (the differences, three products, the sum, the row's own
  statistics), each uniform within u and independent of the others: sqrt(8 / 3) u, under 4 u;
- a sum over R rows in sequence: after k rows the running sum has grown to sqrt(k) terms and is rounded within u of
  that; the R errors together are sqrt(R / 2) u of the final sum for terms of random sign. 4 u for the terms themselves;
- a sum before the norm is rounded too, and what is small beside it (x_hat is, in a row far from 0 beside its deviation)
  has that error whole: it counts as a term;
- storage: rounding to nearest is uniform within half the dtype's epsilon at mantissa 1: epsilon / (2 sqrt(3)). Triton's
  interpreter truncates to bfloat16 (the compiled code does not: `test_compiled.py`), which is uniform within the whole
  epsilon on one side: epsilon / sqrt(3). A result that is rounded twice (x_hat before the weight multiplies it, the
  stream before it is normalised) may be off by both;
- chance: these are expectations. The root mean square of n uniform errors has a deviation of 0.45 / sqrt(n) of itself,
  so four of them are allowed: 1 + 2 / sqrt(n).
"""

import contextlib
import dataclasses
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastln_kernels import launch, norm, reference
from fastln_kernels.reference import NormKind

SUBSETS = [subset for subset in itertools.product((True, False), repeat=3) if any(subset)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDOFF = 2.0**-24
GUARD = 64
SEED = torch.tensor([0x123456789ABCDEF])
LAYER_NORM = NormKind(1e-5)
KINDS = {
    "layer": LAYER_NORM,
    "rms": NormKind(1e-6, centre=False),
    "gemma": NormKind(1e-6, centre=False, offset=1.0),
    "llama": NormKind(1e-6, centre=False, round_normed=True),
}


@dataclass(frozen=True)
class Prologue:
    """What comes before the norm, and what the forward keeps of it."""

    residual: bool = False
    dropout: float = 0.0
    keep: str = "x"  # or "stream" or "normed"


PROLOGUES = {
    "none": Prologue(),
    "normed": Prologue(keep="normed"),
    "pre-norm": Prologue(residual=True, dropout=0.1, keep="stream"),
    "post-norm": Prologue(residual=True, dropout=0.1, keep="normed"),
    "no dropout": Prologue(residual=True, keep="stream"),
    "no residual": Prologue(dropout=0.5, keep="normed"),
}


def storage_bound(dtype: torch.dtype) -> float:
    """What rounding a result to `dtype` costs at most."""
    if dtype in (torch.float32, torch.float64):
        return 0.0
    return torch.finfo(dtype).eps / (math.sqrt(3) if dtype == torch.bfloat16 else 2 * math.sqrt(3))


def assert_close(got: torch.Tensor, want: torch.Tensor, bound: float, scale: torch.Tensor | None = None) -> None:
    def size(t: torch.Tensor) -> float:
        return t.double().square().mean().sqrt().item()

    assert got.shape == want.shape
    if got.numel():
        allowed = bound * (1 + 2 / math.sqrt(got.numel()))
        assert size(got.double() - want) <= allowed * size(want if scale is None else scale) + 1e-30


def fenced(t: torch.Tensor, gap: int = 16) -> torch.Tensor:
    """The same values with NaN before, after and between the rows: whatever is read beyond them shows."""
    n_rows, n_cols = t.shape
    around = torch.full((n_rows + 2, n_cols + gap), math.nan, dtype=t.dtype)
    inner = around[1:-1, :n_cols]
    inner.copy_(t)
    return inner


@pytest.fixture(autouse=True)
def _guarded_empty(monkeypatch):
    """Every tensor the launching functions allocate starts as NaN and lies between NaN bands that must survive."""
    with guarded_empty(monkeypatch):
        yield


@contextlib.contextmanager
def guarded_empty(monkeypatch):
    bands = []

    def empty(shape, *, dtype, device):
        n = math.prod(shape)
        around = torch.full((n + 2 * GUARD,), math.nan, dtype=dtype, device=device)
        bands.extend((around[:GUARD], around[GUARD + n :]))
        return around[GUARD : GUARD + n].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(norm.torch, "empty", empty)
        yield
    assert all(band.isnan().all() for band in bands), "written outside of a buffer"


@dataclass
class Inputs:
    """Everything that a forward and a backward take."""

    x: torch.Tensor
    residual: torch.Tensor
    dy: torch.Tensor
    dstream: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def double(self) -> "Inputs":
        tensors = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Inputs(*(None if t is None else t.double() for t in tensors))


def inputs(n_rows, n_cols, dtype, parameter_dtype=torch.float32, seed=0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    rows = (fenced(normal(n_rows, n_cols).to(dtype)) for _ in range(4))
    return Inputs(*rows, *(normal(n_cols).to(parameter_dtype) for _ in range(2)))


def forward(kernels, given: Inputs, kind: NormKind, prologue: Prologue) -> reference.NormOutputs:
    return kernels.norm_forward(
        given.x,
        given.weight,
        given.bias,
        kind,
        residual=given.residual if prologue.residual else None,
        dropout=prologue.dropout,
        seed=SEED if prologue.dropout else None,
        want_stream=prologue.keep == "stream",
        want_normed=prologue.keep == "normed",
    )


def backward(kernels, given, kept, rstd, kind, prologue, subset, grad_dtype=torch.float32) -> reference.NormGradients:
    """The backward, given only what it may look at."""
    need_rows, need_dweight, need_dbias = subset
    need_kept = need_rows or need_dweight
    return kernels.norm_backward(
        given.dy,
        kept if need_kept else None,
        given.weight if need_rows else None,
        rstd if need_kept else None,
        kind,
        saved_is_normed=prologue.keep == "normed",
        dstream=given.dstream if prologue.keep == "stream" and need_rows else None,
        dropout=prologue.dropout,
        seed=SEED if prologue.dropout and need_rows else None,
        need_dx=need_rows,
        need_dresidual=need_rows and prologue.residual,
        need_dweight=need_dweight,
        need_dbias=need_dbias,
        grad_dtype=grad_dtype,
    )


def lost_to_the_sum(exact: Inputs, kind: NormKind, prologue: Prologue, rstd: torch.Tensor) -> torch.Tensor | float:
    """What relative errors of the summands become in x_hat: much, where they are large beside the row's deviation."""
    if not prologue.residual and not prologue.dropout:
        return 0.0
    sizes = dataclasses.replace(exact, x=exact.x.abs(), residual=exact.residual.abs())
    return forward(reference, sizes, kind, dataclasses.replace(prologue, keep="stream")).stream * rstd[:, None]


def check(given: Inputs, subsets=SUBSETS, kind=LAYER_NORM, prologue=PROLOGUES["none"], grad_dtype=torch.float32):
    """Forward and the backwards of the wanted subsets against the definition in float64."""
    dtype, n_rows = given.x.dtype, given.x.shape[0]
    storage = storage_bound(dtype)
    twice = 1 + (kind.round_normed or prologue.keep == "stream")
    exact = given.double()
    got, want = forward(norm, given, kind, prologue), forward(reference, exact, kind, prologue)
    assert got.y.dtype == dtype
    gain = 1.0 if given.weight is None else exact.weight.abs() + kind.offset
    size = lost_to_the_sum(exact, kind, prologue, want.rstd)
    assert_close(got.y, want.y, 4 * ROUNDOFF + twice * storage, scale=want.y.abs() + size * gain)
    for name in ("stream", "normed"):
        result = getattr(got, name)
        assert (result is None) == (prologue.keep != name)
        if result is not None:
            assert result.dtype == dtype
            scale = getattr(want, name).abs() + (size if name == "normed" else 0)
            assert_close(result, getattr(want, name), 4 * ROUNDOFF + storage, scale=scale)

    # The backward is judged on what the forward kept, as it was rounded.
    kept = {"x": given.x, "stream": got.stream, "normed": got.normed}[prologue.keep]
    rstd = want.rstd
    if prologue.keep != "normed":
        rstd = reference.norm_forward(kept.double(), None, None, kind).rstd
        assert_close(got.rstd, rstd, 4 * ROUNDOFF)
    for subset in subsets:
        result = backward(norm, given, kept, got.rstd, kind, prologue, subset, grad_dtype)
        rounded_rstd = got.rstd.double() if prologue.keep == "normed" else rstd
        wanted = backward(reference, exact, kept.double(), rounded_rstd, kind, prologue, subset, torch.float64)
        need_rows, need_dweight, need_dbias = subset
        need = (need_rows, need_rows and prologue.residual, need_dweight, need_dbias)
        assert [gradient is not None for gradient in result] == list(need)
        weight = 1.0 if given.weight is None else exact.weight + kind.offset
        terms = rounded_rstd[:, None] * exact.dy * weight
        if prologue.keep == "stream":
            terms = terms.abs() + exact.dstream.abs()
        scaled = terms * reference.dropout_keep(*terms.shape, prologue.dropout, SEED)
        scaled = scaled * reference.dropout_scale(prologue.dropout)
        for name, scale in (("dx", scaled), ("dresidual", terms)):
            gradient = getattr(result, name)
            if gradient is not None:
                assert gradient.dtype == dtype
                assert_close(gradient, getattr(wanted, name), 4 * ROUNDOFF + storage, scale=scale)
        normed = kept.double()
        if prologue.keep != "normed":
            normed = reference.norm_forward(normed, None, None, kind).y
        bound = (4 + math.sqrt(n_rows / 2)) * ROUNDOFF + storage_bound(grad_dtype)
        rounding = storage if kind.round_normed else 0.0
        for name, terms, extra in (("dweight", exact.dy * normed, rounding), ("dbias", exact.dy, 0.0)):
            gradient, right = getattr(result, name), getattr(wanted, name)
            if gradient is not None:
                assert gradient.dtype == grad_dtype
                assert_close(gradient, right, bound + extra, scale=terms.norm(dim=0) + right.abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_every_subset_matches_the_definition(subset, dtype):
    check(inputs(7, 384, dtype), [subset])


@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_prologue_matches_the_definition(kind, prologue):
    for dtype in (torch.float32, torch.bfloat16):
        check(inputs(9, 200, dtype), [(True, True, True)], KINDS[kind], PROLOGUES[prologue])


@pytest.mark.parametrize(
    ("n_rows", "n_cols"),
    [(1, 1), (300, 1), (7, 2), (300, 3), (300, 17), (7, 64), (0, 768), (7, 768), (1, 1000), (7, 1152), (1, 4096)],
)
def test_shapes(n_rows, n_cols):
    check(inputs(n_rows, n_cols, torch.float32), [(True, True, True), (False, True, True)])


@pytest.fixture
def wide(monkeypatch):
    """Have rows of few columns take the way of those that the registers cannot hold, in short blocks."""
    monkeypatch.setattr(launch, "row_tile", lambda *_, **__: None)
    monkeypatch.setattr(launch, "WIDE_BLOCK", launch.ColumnTile(rows=1, cols=128, warps=4))


@pytest.fixture
def either_width(request):
    """Number of columns, and `wide` where the test's parameter names it."""
    n_cols, *fixtures = request.param
    for name in fixtures:
        request.getfixturevalue(name)
    return n_cols


def widths(*values):
    return pytest.mark.parametrize("either_width", values, indirect=True)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_cols", [20, 128, 300])
def test_rows_too_wide_for_the_registers(kind, n_cols):
    given = inputs(3, n_cols, torch.bfloat16)
    check(given, [(True, True, True), (False, True, False), (False, False, True)], KINDS[kind])
    check(given, [(True, True, True), (True, False, False)], KINDS[kind], PROLOGUES["pre-norm"])
    check(given, [(True, True, False)], KINDS[kind], PROLOGUES["post-norm"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("n_cols", [9000, 16384, 20000, 33000])
def test_wide_rows_as_they_are(n_cols):
    for dtype in (torch.float32, torch.bfloat16):
        check(inputs(3, n_cols, dtype), [(True, True, True), (True, False, False)], prologue=PROLOGUES["pre-norm"])


def test_what_the_registers_hold():
    widths = (1, 384, 768, 1000, 1152, 1280, 2048, 8192)
    for itemsize, n_cols in itertools.product((2, 4), widths):
        for backward, sums in ((False, False), (True, False), (True, True)):
            tile = launch.row_tile(n_cols, itemsize, backward=backward, sums=sums)
            assert tile.piece * tile.pieces >= n_cols > tile.piece * (tile.pieces - 1)
            lanes = tile.warps * 32
            assert tile.rows * tile.piece * itemsize >= lanes * 16, "every lane has 16 bytes to load"
    assert launch.row_tile(32768, 2, backward=False)
    assert not launch.row_tile(65536, 2, backward=False)
    assert launch.row_tile(16384, 2, backward=True)
    assert not launch.row_tile(16384, 2, backward=True, sums=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n_rows", [0, 1, 7, 300])
@pytest.mark.parametrize("n_cols", [1, 2, 3, 17, 64, 384, 768, 1000, 1152, 4096])
def test_every_shape_subset_kind_and_prologue(n_cols, n_rows, dtype):
    given = inputs(n_rows, n_cols, dtype)
    for kind, prologue in itertools.product(KINDS.values(), PROLOGUES.values()):
        check(given, SUBSETS, kind, prologue)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_width_65536(dtype, kind, prologue):
    check(inputs(3, 65536, dtype), SUBSETS, KINDS[kind], PROLOGUES[prologue])


@pytest.mark.parametrize("kind", ["layer", "gemma"])
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_weight_or_bias_and_in_the_dtype_of_x(has_weight, has_bias, parameter_dtype, kind):
    given = inputs(5, 96, torch.bfloat16, parameter_dtype)
    given = dataclasses.replace(
        given, weight=given.weight if has_weight else None, bias=given.bias if has_bias else None
    )
    check(given, [(True, has_weight, has_bias)], KINDS[kind], grad_dtype=parameter_dtype)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_rows=st.integers(0, 40),
    n_cols=st.integers(2, 300),
    dtype=st.sampled_from(DTYPES),
    subset=st.sampled_from(SUBSETS),
    kind=st.sampled_from(list(KINDS)),
    prologue=st.sampled_from(list(PROLOGUES)),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_stride_and_flags(n_rows, n_cols, dtype, subset, kind, prologue, transposed, seed):
    given = inputs(n_rows, n_cols, dtype, seed=seed)
    if transposed:
        given.x, given.residual = given.x.T.contiguous().T, given.residual.T.contiguous().T
    check(given, [subset], KINDS[kind], PROLOGUES[prologue])


def test_expanded_rows():
    given = inputs(6, 64, torch.float32)
    given.x, given.dy = given.x[:1].expand(6, 64), given.dy[:1, :1].expand(6, 64)
    check(given)


@widths((64,), (300, "wide"))
@pytest.mark.parametrize("strided", ["weight", "bias"])
def test_strided_weight_and_bias(strided, either_width):
    given = inputs(3, either_width, torch.float32)
    beside = torch.full((either_width,), math.nan)
    setattr(given, strided, torch.stack((getattr(given, strided), beside), dim=1)[:, 0])
    check(given, [(True, True, True)])


@widths((768,), (1000, "wide"))
@pytest.mark.parametrize("kernels", [norm, reference], ids=["triton", "reference"])
def test_mean_1e4_with_deviation_1_is_right_to_1e_minus_5(kernels, either_width):
    given = inputs(3, either_width, torch.float32)
    given.x += 1e4
    exact = given.double()
    none = PROLOGUES["none"]
    got, want = forward(kernels, given, LAYER_NORM, none), forward(reference, exact, LAYER_NORM, none)
    assert_close(got.y, want.y, 1e-5)
    result = backward(kernels, given, given.x, got.rstd, LAYER_NORM, none, (True, True, True))
    right = backward(reference, exact, exact.x, want.rstd, LAYER_NORM, none, (True, True, True), torch.float64)
    for gradient, right_gradient in zip(result, right, strict=True):
        if gradient is not None:
            assert_close(gradient, right_gradient, 1e-5)


@pytest.mark.usefixtures("wide")
def test_first_block_of_a_wide_row_far_from_the_rest():
    given = inputs(2, 1000, torch.float32)
    given.x[:, : launch.WIDE_BLOCK.cols] -= 1e4
    want = forward(reference, given.double(), LAYER_NORM, PROLOGUES["none"])
    assert_close(forward(norm, given, LAYER_NORM, PROLOGUES["none"]).y, want.y, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4, 3e-40])
def test_constant_rows(value, kind):
    given = inputs(3, 100, torch.float32)
    given.x = torch.full((3, 100), value)
    check(given, [(False, True, True)], KINDS[kind])
    kind = dataclasses.replace(KINDS[kind], eps=1e-12)
    got = forward(norm, given, kind, PROLOGUES["none"])
    if kind.centre:
        torch.testing.assert_close(got.y, given.bias.expand(3, 100))
    result = backward(norm, given, given.x, got.rstd, kind, PROLOGUES["none"], (True, False, False))
    assert result.dx.isfinite().all()


@pytest.mark.parametrize("keep", ["none", "normed"])
def test_weight_zero(keep):
    given = inputs(7, 100, torch.float32)
    given.weight.zero_()
    prologue = PROLOGUES[keep]
    check(given, [(False, True, True)], prologue=prologue)
    got = forward(norm, given, LAYER_NORM, prologue)
    kept = got.normed if keep == "normed" else given.x
    result = backward(norm, given, kept, got.rstd, LAYER_NORM, prologue, (True, False, False))
    assert torch.equal(got.y, given.bias.expand_as(got.y))
    assert torch.equal(result.dx, torch.zeros_like(result.dx))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # the interpreter's numpy meets inf - inf
@widths((100,), (300, "wide"))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_bad_row_shows_and_does_not_leak(bad, either_width, kind):
    given, subset, others = inputs(5, either_width, torch.float32), (True, False, False), [0, 1, 3, 4]

    def run():
        got = forward(norm, given, KINDS[kind], PROLOGUES["none"])
        result = backward(norm, given, given.x, got.rstd, KINDS[kind], PROLOGUES["none"], subset)
        return got.y, result.dx

    clean = run()
    given.x[2, 1] = bad
    right = forward(reference, given, KINDS[kind], PROLOGUES["none"]).y
    assert torch.equal(run()[0].isnan(), right.isnan())
    for tensor, clean_tensor in zip(run(), clean, strict=True):
        assert tensor[2].isnan().any()
        assert torch.equal(tensor[others], clean_tensor[others])


@pytest.mark.parametrize("need_rows", [True, False])
def test_two_runs_give_the_same_bits(need_rows):
    given, prologue = inputs(300, 48, torch.float32), PROLOGUES["pre-norm"]
    runs = []
    for _ in range(2):
        got = forward(norm, given, LAYER_NORM, prologue)
        result = backward(norm, given, got.stream, got.rstd, LAYER_NORM, prologue, (need_rows, True, True))
        runs.append((*got, *result))
    for first, second in zip(*runs, strict=True):
        assert first is second is None or torch.equal(first, second)


def test_rows_beyond_the_reach_of_32_bits(tmp_path):
    stride, n_cols = 2**30, 16
    given = inputs(4, n_cols, torch.bfloat16)
    # A sparse file: 8 GB of addresses, a few pages of disk.
    flat = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * stride + n_cols, dtype=torch.bfloat16)
    far = flat.as_strided((4, n_cols), (stride, 1))
    far.copy_(given.x)
    given.x = far
    check(given, [(True, True, True), (False, True, True)])


@widths((5,), (384,), (300, "wide"))
@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_drops_what_the_definition_does_forward_and_backward(either_width, dropout):
    n_rows, n_cols = 40, either_width
    x = torch.ones(n_rows, n_cols)
    keep = reference.dropout_keep(n_rows, n_cols, dropout, SEED)
    got = norm.norm_forward(x, None, None, LAYER_NORM, dropout=dropout, seed=SEED, want_stream=True)
    assert torch.equal(got.stream, keep * torch.tensor(reference.dropout_scale(dropout)))
    flags = {"dropout": dropout, "seed": SEED, "need_dx": True, "need_dresidual": True}
    result = norm.norm_backward(torch.zeros_like(x), x, None, got.rstd, LAYER_NORM, dstream=x, **flags)
    assert torch.equal(result.dx, got.stream)
    assert torch.equal(result.dresidual, x)


def test_dropout_keeps_at_its_rate_and_independently():
    n_rows, n_cols, dropout = 500, 400, 0.1
    masks = [reference.dropout_keep(n_rows, n_cols, dropout, torch.tensor([seed])) for seed in (0, 1, 2**40)]
    deviation = math.sqrt(dropout * (1 - dropout))
    kept = [mask.double() - (1 - dropout) for mask in masks]
    for mask in kept:
        assert abs(mask.mean()) < 5 * deviation / math.sqrt(mask.numel())
        for shifted in (mask.roll(1, 0), mask.roll(1, 1), mask.roll(8, 1), mask.roll(2, 1)):
            assert abs((mask * shifted).mean()) < 5 * deviation**2 / math.sqrt(mask.numel())
    for one, other in itertools.combinations(kept, 2):
        assert abs((one * other).mean()) < 5 * deviation**2 / math.sqrt(one.numel())


def test_the_generator_is_philox():
    """The known answers of the Random123 distribution (Salmon et al., SC 2011)."""
    cases = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, answer in cases:
        words = reference._philox(*(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
        assert [word.item() for word in words] == answer


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("kind", ["layer", "rms", "gemma"])
@pytest.mark.parametrize("keep", ["x", "stream", "normed"])
def test_the_definition_is_what_autograd_makes_of_torchs_norms(has_weight, has_bias, kind, keep):
    kind, prologue = KINDS[kind], Prologue(residual=keep != "x", keep=keep)
    given = inputs(7, 33, torch.float32).double()
    given = dataclasses.replace(
        given, weight=given.weight if has_weight else None, bias=given.bias if has_bias else None
    )
    leaves = {
        name: tensor.clone().requires_grad_()
        for name in ("x", "residual", "weight", "bias")
        if (tensor := getattr(given, name)) is not None
    }
    stream = leaves["x"] + leaves["residual"] if prologue.residual else leaves["x"]
    weight = leaves["weight"] + kind.offset if has_weight else None
    bias = leaves.get("bias")
    if kind.centre:
        want_y = torch.nn.functional.layer_norm(stream, (33,), weight, bias, kind.eps)
    else:
        want_y = torch.nn.functional.rms_norm(stream, (33,), weight, kind.eps) + (0 if bias is None else bias)
    loss = (want_y * given.dy).sum() + ((stream * given.dstream).sum() if keep == "stream" else 0)
    want = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), strict=True))
    got = forward(reference, given, kind, prologue)
    torch.testing.assert_close(got.y, want_y.detach())
    kept = {"x": given.x, "stream": got.stream, "normed": got.normed}[keep]
    subset = (True, has_weight, has_bias)
    result = backward(reference, given, kept, got.rstd, kind, prologue, subset, torch.float64)
    for name, gradient in result._asdict().items():
        right = want.get(name[1:])
        assert (gradient is None) == (right is None)
        if gradient is not None:
            torch.testing.assert_close(gradient, right)

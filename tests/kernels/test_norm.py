"""The norm kernels, interpreted, against the definition in float64; `norm_bounds` derives how near they must be."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from norm_bounds import ALL, DTYPES, KINDS, LAYOUTS, PROLOGUES, SUBSETS, check, every_other, inputs, take_the_wide_way

pytestmark = pytest.mark.usefixtures("guarded_buffers")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("subset", SUBSETS, ids=str)
def test_every_subset_matches_the_definition(subset, dtype):
    check(inputs(7, 384, dtype), [subset])


@pytest.mark.slow(take=8)
@pytest.mark.parametrize("prologue", PROLOGUES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_prologue_matches_the_definition(kind, prologue):
    for dtype in (torch.float32, torch.bfloat16):
        check(inputs(9, 200, dtype), [ALL], KINDS[kind], PROLOGUES[prologue])


@pytest.mark.parametrize(
    ("n_rows", "n_cols"),
    [(1, 1), (300, 1), (7, 2), (300, 3), (300, 17), (7, 64), (0, 768), (7, 768), (1, 1000), (7, 1152), (1, 4096)],
)
def test_shapes(n_rows, n_cols):
    check(inputs(n_rows, n_cols, torch.float32), [ALL, (False, True, True)])


@pytest.mark.slow(take=2)
@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_cols", [20, 128, 200, 300])
def test_rows_too_wide_for_the_registers(kind, n_cols):
    given = inputs(3, n_cols, torch.bfloat16)
    check(given, [ALL, (False, True, False), (False, False, True)], KINDS[kind])
    check(given, [ALL, (True, False, False)], KINDS[kind], PROLOGUES["pre-norm"])
    check(given, [(True, True, False)], KINDS[kind], PROLOGUES["post-norm"])


@pytest.mark.slow(take=2)
@pytest.mark.parametrize("rows", ["dx", "dresidual"])
@pytest.mark.parametrize("prologue", ["pre-norm", "post-norm", "no dropout"])
@pytest.mark.parametrize("either_width", [(200,), (200, "wide")], indirect=True, ids=str)
def test_of_x_and_residual_one_alone_wants_a_gradient(either_width, prologue, rows):
    given = inputs(5, either_width, torch.float32)
    check(given, [ALL, (True, False, False)], prologue=PROLOGUES[prologue], rows=(rows,))


@pytest.mark.slow(take=3)
@pytest.mark.parametrize("kind", ["layer", "gemma"])
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("either_width", [(96,), (300, "wide")], indirect=True, ids=str)
def test_without_weight_or_bias_and_in_the_dtype_of_x(either_width, has_weight, has_bias, parameter_dtype, kind):
    given = inputs(5, either_width, torch.bfloat16, parameter_dtype)
    given = dataclasses.replace(
        given, weight=given.weight if has_weight else None, bias=given.bias if has_bias else None
    )
    check(given, [(True, has_weight, has_bias)], KINDS[kind], grad_dtype=parameter_dtype)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), n_cols=st.integers(1, 300), seed=st.integers(0, 99))
def test_any_shape_strides_and_flags(data, n_cols, seed):
    def one_of(values):
        return data.draw(st.sampled_from(list(values)))

    wide, parameter_dtype = one_of((False, True)), one_of(DTYPES)
    n_rows = data.draw(st.integers(0, 4 if wide else 40))
    given = inputs(n_rows, n_cols, one_of(DTYPES), parameter_dtype, seed)
    for name in ("x", "residual", "dy", "dstream"):
        setattr(given, name, LAYOUTS[one_of(LAYOUTS)](getattr(given, name)))
    for name in ("weight", "bias"):
        vector = getattr(given, name)
        setattr(given, name, one_of((None, vector, every_other(vector))))
    with pytest.MonkeyPatch.context() as patch:
        if wide:
            take_the_wide_way(patch)
        check(
            given,
            [one_of(SUBSETS)],
            KINDS[one_of(KINDS)],
            PROLOGUES[one_of(PROLOGUES)],
            rows=one_of((("dx",), ("dx", "dresidual"))),
            grad_dtype=one_of((torch.float32, parameter_dtype)),
        )


@pytest.mark.slow(take=2)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("either_width", [(64,), (300, "wide")], indirect=True, ids=str)
def test_strides(either_width, layout):
    given = inputs(6, either_width, torch.float32)
    for name in ("x", "residual", "dy", "dstream"):
        setattr(given, name, LAYOUTS[layout](getattr(given, name)))
    check(given, [ALL, (False, True, True)])
    check(given, [ALL], prologue=PROLOGUES["pre-norm"])


def test_the_gradient_of_a_plain_sum():
    given = inputs(6, 64, torch.float32)
    given.dy = torch.ones(()).expand(6, 64)
    check(given)


@pytest.mark.parametrize("strided", ["weight", "bias"])
@pytest.mark.parametrize("either_width", [(64,), (300, "wide")], indirect=True, ids=str)
def test_strided_weight_and_bias(either_width, strided):
    given = inputs(3, either_width, torch.float32)
    setattr(given, strided, every_other(getattr(given, strided)))
    check(given, [ALL])


WIDTHS = [1, 2, 3, 17, 64, 384, 768, 1000, 1152, 4096, 9000, 20000, 65536]
SHAPES = [(n_cols, n_rows) for n_cols in WIDTHS for n_rows in ((0, 1, 7, 300) if n_cols <= 4096 else (2,))]
FEW_ELEMENTS = 2**14


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n_cols", "n_rows"),
    [
        pytest.param(*shape, marks=pytest.mark.slow(take=0 if math.prod(shape) > FEW_ELEMENTS // 8 else 1))
        for shape in SHAPES
    ],
)
def test_every_shape_subset_kind_and_prologue(n_cols, n_rows, dtype):
    """Every forward in every dtype, and every backward in one of them, which turns with the shape.

    Interpreted, larger tensors take minutes: there a part of the kinds and prologues is taken, which turns likewise.
    """
    given = inputs(n_rows, n_cols, dtype)
    turn = SHAPES.index((n_cols, n_rows)) + DTYPES.index(dtype)
    pairs = list(itertools.product(KINDS.values(), PROLOGUES.values()))
    step = min(1 + n_rows * n_cols // FEW_ELEMENTS, len(pairs))
    for i in range(turn % step, len(pairs), step):
        subsets = [subset for j, subset in enumerate(SUBSETS) if (turn + i + j) % len(DTYPES) == 0]
        check(given, subsets, *pairs[i])

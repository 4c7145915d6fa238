"""The definition of 8-bit rows and linear layers against exact arithmetic, with derived bounds."""

import math

import torch

from fastln_kernels import reference_int8 as reference


def test_turning_is_a_hadamard_matrix_and_its_own_inverse():
    matrix = reference.turn(torch.eye(64, dtype=torch.float64))
    assert matrix.abs().allclose(torch.full((64, 64), 1 / 8, dtype=torch.float64))
    assert (matrix @ matrix).allclose(torch.eye(64, dtype=torch.float64))
    x = torch.randn(3, 192, dtype=torch.float64)
    assert reference.turn(reference.turn(x)).allclose(x)


def test_no_number_is_off_by_more_than_half_a_step():
    torch.manual_seed(0)
    x, factors = torch.randn(20, 128), torch.rand(128) + 0.5
    for turned in (False, True):
        rows = reference.quantise(x, factors, turned=turned)
        want = reference.turn(x * factors) if turned else x * factors
        off = (rows.values * rows.scale[:, None] - want).abs()
        assert (off <= rows.scale[:, None] * 0.5001).all()
        assert (rows.values.abs().amax(1) == reference.LARGEST).all()


def test_rows_without_numbers_and_rows_that_are_none():
    x = torch.ones(5, 64)
    x[0], x[1], x[2, 3], x[3, 3], x[4, :] = 0, 1e-31, math.inf, math.nan, 2e-30
    rows = reference.quantise(x)
    assert rows.scale[:2].eq(0).all()
    assert rows.scale[2:4].isnan().all()
    assert rows.scale[4] > 0
    assert not rows.values[:4].any()
    y = reference.linear(rows, reference.quantise_weight(torch.randn(3, 64)), None, torch.float32)
    assert y[:2].eq(0).all()
    assert y[2:4].isnan().all()
    assert y[4].isfinite().all()


def test_products_are_as_exact_as_their_rounding():
    """Errors of half a step, independent: their root mean square is a step / sqrt(12) in each factor."""
    torch.manual_seed(0)
    x, weight, dy = torch.randn(64, 512).double(), torch.randn(256, 512).double(), torch.randn(64, 256).double()
    for turned in (False, True):
        made = reference.quantise_weight(weight, turned=turned)
        rows = reference.quantise(x, turned=turned)
        y = reference.linear(rows, made, None, torch.float64)
        dx = reference.linear_backward(reference.quantise(dy, made.scale), made, torch.float64)
        for got, want, a, b in ((y, x @ weight.t(), x, weight), (dx, dy @ weight, dy, weight)):
            step = [(z.abs().amax(1) / reference.LARGEST / z.square().mean(1).sqrt()).square().mean() for z in (a, b)]
            bound = math.sqrt((step[0] + step[1]) / 12)
            error = (got - want).norm() / want.norm()
            assert 0.3 * bound < error < 1.5 * bound


def test_a_turned_row_keeps_its_small_numbers_beside_an_outlier():
    torch.manual_seed(0)
    x, weight = torch.randn(8, 512), torch.randn(64, 512)
    x[:, 7] = 300
    weight[:, 7] = 0  # so that only the others count
    errors = []
    for turned in (False, True):
        made = reference.quantise_weight(weight, turned=turned)
        y = reference.linear(reference.quantise(x, turned=turned), made, None, torch.float32)
        errors.append(((y - x @ weight.t()).norm() / (x @ weight.t()).norm()).item())
    assert errors[1] < errors[0] / 3


def test_a_second_term_holds_what_the_first_leaves_over():
    torch.manual_seed(0)
    weight = torch.randn(20, 128)
    for turned in (False, True):
        made = reference.quantise_weight(weight, turned=turned)
        rest = reference.quantise_weight(reference.left_over(weight, made))._replace(turned=turned)
        off = [reference.dequantise_weight(made, more) - weight for more in (None, rest)]
        # Each rounding is to 127 steps of at most half a step of the one before; turning back keeps a row's length.
        most = [made.scale / 2, made.scale / 2 / 127 / 2]
        for error, bound in zip(off, most, strict=True):
            assert (error.norm(dim=1) <= 1.001 * bound * math.sqrt(128)).all()
            assert (error.norm(dim=1) >= 0.1 * bound * math.sqrt(128)).all()


def test_blocks_of_a_second_term_are_the_whole(monkeypatch):
    torch.manual_seed(0)
    weight = torch.randn(21, 128).bfloat16()
    for turned in (False, True):
        made = reference.quantise_weight(weight, turned=turned)
        want = reference.quantise_weight(reference.left_over(weight, made))._replace(turned=turned)
        monkeypatch.setattr(reference, "BLOCK", 5 * 128)
        torch.testing.assert_close(tuple(reference.second_term(weight, made)), tuple(want), rtol=0, atol=0)
        monkeypatch.undo()


def test_sums_of_blocks(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 100)
    for shape in ((0, 3), (3, 0), (1, 300), (70, 30)):
        values = torch.randint(-127, 128, shape, dtype=torch.int8)
        want = tuple(values.sum(dim, dtype=torch.int32) for dim in (1, 0))
        torch.testing.assert_close(reference.sums_of(values), want, rtol=0, atol=0)
        assert [part.shape for part in reference.sums_of(values.to("meta"))] == [part.shape for part in want]

import derivative_levels
import pytest
import torch

from fastln_kernels.reference_codes import LEVELS, N_LEVELS


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
def test_the_committed_levels_are_the_means_of_their_cells(kind):
    slopes, shares = derivative_levels.derivatives(kind)
    for bits in N_LEVELS:
        levels = torch.tensor(LEVELS[kind, bits], dtype=torch.float64)
        torch.testing.assert_close(derivative_levels.cell_means(slopes, shares, levels), levels, rtol=0, atol=3e-4)


@pytest.mark.parametrize("kind", ["gelu", "silu"])
def test_decoded_derivatives_are_right_on_average(kind):
    errors = {bits: derivative_levels.errors(kind, bits) for bits in (8, 4, 2)}
    for _, mean in errors.values():
        assert abs(mean) < 5e-4
    assert errors[8][0] < errors[4][0] / 10
    assert errors[4][0] < errors[2][0] / 3


def test_lloyd_max_of_a_uniform_distribution_is_uniform():
    values = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    levels = derivative_levels.lloyd_max(values, torch.full_like(values, 1 / len(values)), 4)
    torch.testing.assert_close(levels.tolist(), [1 / 8, 3 / 8, 5 / 8, 7 / 8], rtol=0, atol=1e-4)

"""The table of gradients' cosines."""

import gradient_cosines
import pytest
import torch


def test_cosines_are_of_all_together_and_of_each():
    exact = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([0.0, 4.0]), "unused": torch.zeros(2)}
    found = {"a": torch.tensor([3.0, 3.0]), "b": torch.tensor([0.0, 1.0]), "unused": torch.ones(2)}
    row = gradient_cosines.compare(found, exact)
    assert row["together"] == pytest.approx((9 + 4) / (19**0.5 * 5))
    assert (row["worst"], row["worst_norm"]) == (pytest.approx(0.5**0.5), "a")
    assert row["each"].keys() == {"a", "b"}


def test_short_gradients_have_a_direction_too():
    tiny = {"a": torch.tensor([3e-12, 0.0], dtype=torch.float64)}
    row = gradient_cosines.compare({"a": torch.tensor([3e-12, 3e-12], dtype=torch.float64)}, tiny)
    assert row["worst"] == row["together"] == pytest.approx(0.5**0.5)
    assert gradient_cosines.compare({"a": torch.zeros(2, dtype=torch.float64)}, tiny)["worst"] == 0

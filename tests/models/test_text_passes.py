"""Texts of like length in passes of their own: the cheapest cut, and the features and gradients of a single pass."""

from itertools import combinations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastln.models import dual_encoder
from fastln.models.dual_encoder import PASS_TOKENS, passes


def cost(lengths, ends):
    return sum((end - start) * lengths[end - 1] + PASS_TOKENS for start, end in zip([0, *ends], ends, strict=False))


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=8).map(sorted))
def test_no_cut_is_cheaper(lengths):
    n = len(lengths)
    cuts = [[*cut, n] for size in range(n) for cut in combinations(range(1, n), size)]
    assert passes(lengths)[-1] == n
    assert cost(lengths, passes(lengths)) == min(cost(lengths, ends) for ends in cuts)


def test_one_pass_where_texts_are_alike_and_several_where_they_are_not():
    assert passes([20] * 32) == [32]
    assert passes([5] * 30 + [60] * 2) == [30, 32]


@pytest.mark.parametrize("side", ["right", "left"])
def test_features_and_gradients_are_those_of_one_pass(side, tmp_path, monkeypatch):
    task = tiny.dual(tmp_path, tiny.phantom())
    model, n_tokens = task.model, 40
    lengths = torch.tensor([40, 3, 0, 17, 3, 39, 5, 18])
    place = torch.arange(n_tokens) if side == "right" else torch.arange(n_tokens).flip(0)
    mask = (place < lengths[:, None]).long()
    ids = torch.randint(5, 100, mask.shape, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(8, tiny.WIDTH, generator=torch.Generator().manual_seed(1))
    widths, found = [], []
    model.text.embeddings.register_forward_hook(lambda module, args, output: widths.append(output.shape[:2]))
    for tokens in (10**6, 1):
        monkeypatch.setattr(dual_encoder, "PASS_TOKENS", tokens)
        features = model.text_features(ids, mask)
        (features * direction).sum().backward()
        found.append((features, model.text.embeddings.word_embeddings.weight.grad.clone()))
        model.zero_grad()
    spared = sum(rows * width for rows, width in widths[1:])
    assert spared < 0.6 * 8 * n_tokens if side == "right" else spared >= 7 * n_tokens
    for one, several in zip(*found, strict=True):
        assert one.abs().max() > 1e-2
        torch.testing.assert_close(several, one, rtol=1e-4, atol=1e-5)

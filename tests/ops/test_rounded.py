"""Rows in 8 bits that attention and dropout write for the layers around them: found through views, and only then."""

import copy

import pytest
import torch

from fastln import ops
from fastln.ops import rounded
from fastln.ops.attention import attention
from fastln.ops.rounded import Form, Reader
from fastln_kernels import reference_int8
from fastln_kernels.cpu import library, native_dropout, native_int8, products

WHY_NOT = products.why_not("int8") or products.why_not("attention") or library.why_not("dropout")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT}")

N_BATCHES, N_TOKENS, N_HEADS, DIM = 2, 24, 4, 16
WIDTH = N_HEADS * DIM


@pytest.fixture
def passes(monkeypatch):
    """Count the passes over rows, for layers' inputs and for gradients."""
    counts, quantise = [0, 0], native_int8.quantise

    def counted(x, factors=None, *, turned=False):
        counts[factors is not None] += 1
        return quantise(x, factors, turned=turned)

    monkeypatch.setattr(native_int8, "quantise", counted)
    return counts


def weight(seed, n_cols=WIDTH, turned=False):
    made = torch.randn(n_cols, WIDTH, generator=torch.Generator().manual_seed(seed))
    return reference_int8.quantise_weight(made / 8, turned=turned)


def heads(rows):
    return rows.unflatten(-1, (-1, DIM)).transpose(1, 2)


class Attention:
    """Four layers in 8 bits and attention; a case changes what stands between them."""

    def __init__(self):
        self.reader, self.norm_reader = Reader(), Reader()
        self.weights = [weight(seed) for seed in range(4)]

    def heads(self, name, rows):
        return heads(rows)

    def out(self, out):
        return out.transpose(1, 2).reshape(N_BATCHES, -1, WIDTH)

    def __call__(self, x):
        made = {name: ops.int8_linear(x, weight) for name, weight in zip("qkv", self.weights, strict=False)}
        q, k, v = (self.heads(name, rows) for name, rows in made.items())
        return ops.int8_linear(self.out(attention(q, k, v, reader=self.reader)), self.weights[3])


class Groups(Attention):
    def __init__(self):
        super().__init__()
        self.weights[1:3] = [weight(seed, WIDTH // 2) for seed in (1, 2)]


class Rotary(Attention):
    def heads(self, name, rows):
        return heads(rows) if name == "v" else heads(rows) * 0.5


class TokensFirst(Attention):
    def heads(self, name, rows):
        return heads(rows.transpose(0, 1))

    def out(self, out):
        return super().out(out.transpose(0, 2)[:, :, :N_BATCHES])


class HeadsFirst(Attention):
    """Each head's columns are not side by side in a row."""

    def heads(self, name, rows):
        return rows.unflatten(-1, (DIM, N_HEADS)).movedim(-1, 1)


class Summed(Attention):
    def heads(self, name, rows):
        return heads(rows) if name != "k" else heads(rows) + heads(rows).detach()


class Written(Attention):
    def heads(self, name, rows):
        made = heads(rows)
        made.register_hook(lambda gradient: gradient.mul_(2))
        return made


class Part(Attention):
    def out(self, out):
        return super().out(out)[:, 1:]


class Doubled(Attention):
    def out(self, out):
        made = super().out(out)
        return torch.cat([made, made], 1)


# Passes that round rows for layers' inputs and for gradients, from the second call on.
CASES = {Attention: (0, 0), Groups: (0, 0), Rotary: (0, 2), HeadsFirst: (0, 3), Summed: (0, 1), Written: (0, 3)}
CASES |= {Part: (1, 0), Doubled: (1, 0), TokensFirst: None}


def step(module):
    """Run a norm, the module and a norm, so that only the rows between its layers may need passes."""
    x = torch.randn(N_BATCHES, N_TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kind, ones = ops.NormKind(1e-5), torch.ones(WIDTH)
    y = module(ops.dropout_add_norm(x, None, ones, None, kind, reader=module.norm_reader))
    ops.dropout_add_norm(y, None, ones, None, kind).pow(3).sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_attention_writes_its_rows_for_the_layers_around_it(case, passes, monkeypatch):
    module = case()
    step(module)
    passes[:] = 0, 0
    y, dx = step(module)
    if CASES[case] is not None:
        assert tuple(passes) == CASES[case]
    assert not rounded._at_hand.gradients
    monkeypatch.setattr(rounded, "_fuses", False)
    want, want_dx = step(module)
    assert torch.equal(y, want)
    assert torch.equal(dx, want_dx)


def test_a_result_that_was_written_to_is_rounded_again(passes):
    module = Attention()
    step(module)
    x = torch.randn(N_BATCHES, N_TOKENS, WIDTH)
    with torch.no_grad():
        out = attention(heads(x), heads(x), heads(x), reader=module.reader)
        rows = module.out(out)
        passes[0] = 0
        first = ops.int8_linear(rows, module.weights[3])
        assert passes[0] == 0
        out.mul_(3)
        second = ops.int8_linear(rows, module.weights[3])
    assert passes[0] == 1
    assert not torch.equal(first, second)
    assert torch.equal(second, ops.int8_linear(rows.clone(), module.weights[3]))


def test_views_that_order_rows_otherwise_are_rounded_by_themselves(passes):
    x, made = torch.randn(3, 5, WIDTH), weight(0)
    swapped, whole = ops.int8_linear(x.transpose(0, 1), made), ops.int8_linear(x, made)
    assert passes[0] == 2
    assert torch.equal(swapped.transpose(0, 1), whole)
    for view in (x.view(-1, WIDTH), x.view(15, 1, WIDTH), x.transpose(0, 1).transpose(0, 1)):
        assert torch.equal(ops.int8_linear(view, made).view(whole.shape), whole)
    assert passes[0] == 2
    # Swapped rows that come second, rows of another width, other numbers.
    assert torch.equal(ops.int8_linear(x.transpose(0, 1), made), swapped)
    narrow = reference_int8.quantise_weight(torch.randn(8, 3 * 5))
    ops.int8_linear(x, made)
    assert ops.int8_linear(x.view(WIDTH, 3 * 5), narrow).shape == (WIDTH, 8)
    ops.int8_linear(x, made)
    assert torch.equal(ops.int8_linear(x.view(torch.int32).view(torch.float32)[1:], made), whole[1:])


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_dropout_writes_its_rows_forward_and_backward(p, passes, monkeypatch):
    reader, results = Reader(), []
    for fuses in (True, True, False):
        monkeypatch.setattr(rounded, "_fuses", fuses)
        x = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
        passes[:] = 0, 0
        hidden = ops.int8_linear(x, weight(0))
        y = ops.int8_linear(ops.dropout(hidden, p, seed=torch.tensor([3]), reader=reader), weight(1, turned=True))
        y.pow(3).sum().backward()
        results.append((y.detach(), x.grad, tuple(passes)))
    assert [counts for *_, counts in results] == [(2, 1), (1, 1), (2, 2)]
    for y, dx, _ in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])


def test_the_gradient_of_dropout_does_not_count_as_its_result():
    reader = Reader()
    x = torch.randn(20, WIDTH, requires_grad=True)
    ops.int8_linear(ops.dropout(x, 0.3, reader=reader), weight(0)).sum().backward()
    for _ in range(3):
        y = ops.dropout(x, 0.3, reader=reader)
        assert reader.unread == 1
        ops.int8_linear(y, weight(0)).sum().backward()
        assert reader.unread == 0


def test_factors_are_told_apart_by_object_and_not_by_memory():
    memory, dy = torch.rand(WIDTH) + 0.5, torch.randn(5, WIDTH)
    first = Form(native_int8, WIDTH, factors=memory.view(WIDTH))
    rounds = rounded._rounds(first, native_dropout, dy, None)
    made = rounds.of(native_dropout.dropout(dy, 0.0, torch.tensor([0]), *rounds.told))
    memory.mul_(torch.rand(WIDTH) + 0.5)  # as if it had been freed, and other factors were made in its place
    second = Form(native_int8, WIDTH, factors=memory.view(WIDTH))
    got, want = rounded.gradient_rows(made, second), native_int8.quantise(dy, second.factors)
    assert torch.equal(got.scale, want.scale)
    assert rounded.gradient_rows(made, first) is rounds.rows


def test_readers_of_copies_learn_by_themselves():
    reader = Reader()
    reader.form = Form(native_int8, WIDTH)
    assert copy.deepcopy(reader).form is None

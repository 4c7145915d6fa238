"""Operations counted in a forward pass, against formulas and against torch's own counter of a whole step."""

import copy

import pytest
import torch
import transformers
from family_models import batch, make
from tiny import SIZES, blip_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastln.cost import Products, count_operations
from fastln.errors import FastLNError
from fastln.methods import norm_parameters
from fastln.standins.part import is_stand_in
from fastln.state import prepared

PER_ROW = 32 * 32 + 2 * 32 * 64  # of a block's products behind its attention
TEXT = {**SIZES, "vocab_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def with_norms_alone(model):
    trained = set(norm_parameters(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model.train()


def counted_by_torch(model, batch):
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(**batch).loss.backward()
    return counter.get_total_flops()


def test_a_step_of_bert_with_a_label_everywhere_is_what_torch_counts():
    """Everywhere, for torch counts the head's every position."""
    model = with_norms_alone(transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)))
    ids = torch.randint(0, 64, (2, 12))
    batch = {"input_ids": ids, "labels": ids}
    assert count_operations(model, batch).all == counted_by_torch(model, batch)


def test_blip_s_own_attention_is_counted_too():
    config = blip_config()
    model = with_norms_alone(transformers.BlipForQuestionAnswering(config))
    ids = torch.randint(3, 100, (2, 6))
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "input_ids": ids, "decoder_input_ids": ids, "labels": ids}
    first_tokens = 4 * 2 * PER_ROW  # of the images, pooled apart though nobody reads them
    last_tokens = 4 * 2 * (PER_ROW + 32 * 32 + 32 * 160)  # of the answers, whose logits have no label: block and head
    want = counted_by_torch(model, batch) + first_tokens - last_tokens
    assert count_operations(model, batch).all == pytest.approx(want, rel=1e-3)


def test_the_last_block_and_the_head_count_where_labels_are():
    model = with_norms_alone(transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)))
    ids = torch.randint(0, 64, (2, 12))
    few = torch.where(torch.arange(12) < 3, ids, -100)
    all_, some = (count_operations(model, {"input_ids": ids, "labels": labels}).all for labels in (ids, few))
    assert all_ - some == 4 * (24 - 6) * (PER_ROW + 32 * 32 + 32 * 64)  # the block, the head's transform and the head
    assert not any(map(is_stand_in, model.modules()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_the_last_block_counts_where_something_is_read(name):
    model, inputs = with_norms_alone(make(name)), batch(name)
    with Products(model, inputs["labels"]) as products:
        model(**inputs)
    n_read, n_tokens, per_row = {"llama": (4, 24, 7168), "gpt2": (4, 24, 9216), "vit": (2, 34, PER_ROW)}[name]
    assert products.operations - count_operations(model, inputs).all == 4 * (n_tokens - n_read) * per_row


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "blip", "llava", "vit", "clip"])
def test_a_stock_model_s_products_are_the_same_on_meta(name):
    model, inputs = with_norms_alone(make(name)), batch(name)
    with Products(model, inputs.get("labels")) as on_cpu:
        model(**inputs)
    # On meta no row waits, so the last block counts whole there, as in stock code.
    assert count_operations(model.to("meta"), inputs) == (on_cpu.operations, on_cpu.in_linears)
    assert 0 < on_cpu.in_linears < on_cpu.operations


def test_a_step_on_meta_with_a_label_everywhere_counts_as_on_a_cpu():
    model = with_norms_alone(transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)))
    ids = torch.randint(0, 64, (2, 12))
    inputs = {"input_ids": ids, "labels": ids}
    assert count_operations(copy.deepcopy(model).to("meta"), inputs) == count_operations(model, inputs)


def test_labels_without_values_are_an_error():
    model = with_norms_alone(make("bert")).to("meta")
    with pytest.raises(FastLNError, match=r"labels on the meta device have no values.*leave them on cpu"):
        count_operations(model, {name: value.to("meta") for name, value in batch("bert").items()})
    assert prepared(model) is None


def test_a_model_that_was_counted_trains_what_it_did():
    model = with_norms_alone(make("llama").bfloat16())
    before = {name: (p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    count_operations(model, batch("llama"))
    assert {name: (p.requires_grad, p.dtype) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("need_dx", [False, True])
def test_linear_layers(need_dx, frozen):
    layer = nn.Linear(5, 7).requires_grad_(not frozen)
    with Products(layer) as products:
        layer(torch.randn(2, 3, 5, requires_grad=need_dx))
    assert products.operations == 2 * 6 * 5 * 7 * (1 + need_dx + (not frozen))


@pytest.mark.parametrize(("n_keys", "causal", "pairs"), [(5, False, 20), (4, True, 10), (3, True, 9), (6, True, 10)])
def test_attention(n_keys, causal, pairs):
    """Two products forward, four backward."""
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (4, n_keys, n_keys))
    with Products(nn.Module()) as products:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert products.operations == 6 * 2 * 6 * pairs * 8

"""What a step does, counted on meta, and the seconds that a device takes for it."""

import pytest
import torch
import transformers
from family_models import batch, make
from tiny import SIZES

from fastln.cost import count_operations
from fastln.devices import Device
from fastln.engines import put_method
from fastln.step_time import Call, Costs, Work, step_seconds, step_work

TEXT = {**SIZES, "vocab_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)).to("meta").train()


def test_the_products_of_stock_code_are_those_that_the_floor_counts():
    """But for the scores, which the backward of blockwise attention makes again."""
    model = put_method(bert(), "layernorm", "torch")
    ids = torch.randint(0, 64, (2, 12))
    inputs = {"input_ids": ids, "labels": ids}
    work = step_work(model, inputs)
    scores = 2 * 2.0 * (2 * 2 * 12 * 12) * 16  # layers, samples and heads, pairs, the width of a head
    assert work.operations == count_operations(model, inputs).all + scores


def test_logits_and_rows_that_wait_count_where_labels_are():
    ids = torch.randint(0, 64, (2, 12))
    few = torch.where(torch.arange(12) < 3, ids, -100)
    model = put_method(bert(), "layernorm", "fastln")
    all_, some = (step_work(model, {"input_ids": ids, "labels": labels}).operations for labels in (ids, few))
    per_row = 32 * 32 + 2 * 32 * 64 + 32 * 32 + 32 * 64  # the last block behind its attention, the head
    assert all_ - some == 4 * (24 - 6) * per_row


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_what_is_made_again_counts_again(name):
    exact, again = (
        step_work(put_method(make(name).to("meta"), "layernorm", "fastln", activations=mode), batch(name)).operations
        for mode in ("exact", "recompute")
    )
    assert 1.05 * exact < again < 1.5 * exact


def test_8_bit_products_are_counted_apart():
    work = step_work(put_method(make("vit").to("meta"), "layernorm", "fastln"), batch("vit"))
    in_8_bits = step_work(put_method(make("vit").to("meta"), "layernorm", "fastln", products="int8"), batch("vit"))
    if not any(call.kind == "int8" for call in in_8_bits.calls):
        pytest.skip("no 8-bit products on this processor")
    assert in_8_bits.operations == work.operations


DEVICE = Device("some", 10**9, 1e9, {"float32": 1e9, "int8": 4e9}, "a test", kind="cpu")
COSTS = Costs({"linear": 0.5, "attention": 0.25, "int8": 1.0}, 0.5, 0.001, overlaps=False, source="a test")


@pytest.mark.parametrize(
    ("call", "seconds"),
    [
        (Call("linear", "float32", 1e9, 0.0), 2.0),
        (Call("linear", "bfloat16", 1e9, 0.0), 2.0),  # no units for it: those of float32
        (Call("linear", "float32", 1e9, 2e9), 4.0),  # the memory takes longer than the product
        (Call("attention", "float32", 1e9, 0.0), 4.0),
        (Call("int8", "int8", 1e9, 0.0), 0.25),
        (Call("other", "", 0.0, 1e9), 2.0),
    ],
)
def test_seconds_of_a_call_by_hand(call, seconds):
    parts = step_seconds(Work({call: 3}), DEVICE, COSTS)
    assert parts.total == pytest.approx(3 * (seconds + 0.001))
    assert parts.products + parts.memory == pytest.approx(3 * seconds)


def test_where_calls_overlap_the_longer_counts():
    costs = Costs(COSTS.efficiency, 0.5, 5.0, overlaps=True, source="a test")
    assert step_seconds(Work({Call("other", "", 0.0, 1e9): 2}), DEVICE, costs).total == 10.0

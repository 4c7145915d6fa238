"""The anatomy of a step: every operation has its row, the backward's that of what it is the backward of."""

from types import SimpleNamespace

import pytest
import torch
from step_anatomy import ROWS, Subject, kind_of, sort, table


def event(name, *, parent=None, number=-1, time=1.0, shapes=()):
    return SimpleNamespace(
        name=name, cpu_parent=parent, sequence_nr=number, self_cpu_time_total=time, input_shapes=list(shapes)
    )


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["aten::addmm", "aten::linear"], "linears"),
        (["aten::bmm", "aten::_scaled_dot_product_attention_math"], "attention"),
        (["aten::bernoulli_", "aten::dropout", "aten::_scaled_dot_product_attention_math"], "dropout"),
        (["aten::_softmax", "aten::softmax"], "attention"),
        (["aten::_log_softmax", "aten::cross_entropy_loss"], "head"),
        (["aten::mm", "_LinearCrossEntropy"], "head"),
        (["aten::native_layer_norm", "aten::layer_norm"], "norms"),
        (["aten::new_empty", "_EagerNorm"], "norms"),
        (["_EagerDropout"], "dropout"),
        (["_EagerAttention"], "attention"),
        (["aten::gelu"], "activations"),
        (["aten::normal_"], "other"),
        (["aten::embedding"], "other"),
    ],
)
def test_kinds(names, kind):
    assert kind_of([event(name) for name in names], None) == kind


def test_the_head_s_product_is_told_by_its_classes():
    chain = [event("aten::addmm", shapes=[[1000], [8, 16], [16, 1000]]), event("aten::linear")]
    assert kind_of(chain, 1000) == "head"
    assert kind_of(chain, 999) == "linears"
    assert kind_of([event("aten::embedding", shapes=[[1000, 16]])], 1000) == "other"


def test_a_backward_is_of_the_kind_of_the_last_operation_with_its_number():
    forward, backward = event("forward", time=2.0), event("backward", time=3.0)
    node = event("autograd::engine::evaluate_function: AddmmBackward0", parent=backward, number=7)
    times = sort(
        [
            forward,
            event("aten::gelu", parent=forward, number=7, time=5.0),
            event("aten::addmm", parent=forward, number=7, time=7.0),
            backward,
            node,
            event("aten::mm", parent=node, time=11.0),
            event("AccumulateGrad", parent=backward, time=13.0),
        ],
        None,
    )
    assert times == {
        "between": 5.0, "activations": 5.0, "linears, forward": 7.0, "linears, backward": 12.0, "other": 13.0
    }  # fmt: skip


@pytest.mark.parametrize("engine", ["fastln", "peft"])
def test_a_step_has_time_in_every_row(engine):
    subject = Subject(f"layernorm/{engine}", "BertForMaskedLM:1x16:1", torch.float32)
    subject.measure()
    assert set(subject.times) <= set(ROWS)
    assert all(subject.times[row] > 0 for row in ROWS)
    lines = table({engine: subject}, 1).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [*ROWS, "all", "not profiled, median"]

"""BLIP's attention, which asks no interface: stock against stand-ins."""

import pytest
import torch
from only import prepare_only
from tiny import blip_config
from torch import Tensor
from transformers import BlipForQuestionAnswering
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

import fastln
from fastln.standins.tricks import TRICKS

N_PATCHES, N_WORDS, N_ANSWER = 17, 9, 5


def make(dropout: float = 0.0) -> BlipForQuestionAnswering:
    """A tiny random model that trains, without dropout but for attention's."""
    torch.manual_seed(0)
    config = blip_config()
    config.vision_config.attention_dropout = dropout
    config.text_config.attention_probs_dropout_prob = dropout
    config.text_config.hidden_dropout_prob = 0.0
    return BlipForQuestionAnswering(config).train()


def make_fast(dropout: float = 0.0) -> BlipForQuestionAnswering:
    model = make(dropout)
    return prepare_only(model, "attention")


def batch() -> dict[str, Tensor]:
    """Images, padded questions, answers."""
    generator = torch.Generator().manual_seed(1)
    padding = torch.ones(2, N_WORDS, dtype=torch.long)
    padding[1, 6:] = 0
    return {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "input_ids": torch.randint(1, 100, (2, N_WORDS), generator=generator),
        "attention_mask": padding,
        "labels": torch.randint(1, 100, (2, N_ANSWER), generator=generator),
    }


def step(model: torch.nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(**batch()).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tricks", [["attention"], TRICKS], ids=["attention", "all"])
def test_same_loss_and_gradients(tricks):
    loss, grads = step(make())
    model = make()
    prepare_only(model, *tricks)
    for module in model.modules():
        assert type(module) not in (BlipAttention, BlipTextSelfAttention)
    fast_loss, fast_grads = step(model)
    torch.testing.assert_close(fast_loss, loss, rtol=1e-6, atol=0)
    assert fast_grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad and name in grads}
    for name, grad in fast_grads.items():
        # A bias of keys changes no probability, so that its gradient is rounding alone.
        assert (grad - grads[name]).norm() <= 1e-5 * grads[name].norm().clamp_min(1e-4), name


def test_gradients_with_dropout_are_those_of_the_same_draw():
    model = make_fast(0.2).double()
    norm = model.vision_model.encoder.layers[0].layer_norm1.weight
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in batch().items()}

    def loss() -> Tensor:
        torch.manual_seed(3)
        return model(**inputs).loss

    (grad,) = torch.autograd.grad(loss(), norm)
    direction = grad / grad.norm()
    values = []
    for change in (1e-3, -2e-3):
        with torch.no_grad():
            norm += change * direction
        values.append(loss().item())
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(grad.norm().item(), rel=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_no_probabilities_are_saved(dropout):
    lengths = {N_PATCHES, N_WORDS, N_ANSWER}
    saved = {}

    def pack(x: Tensor) -> Tensor:
        if x.ndim in (3, 4) and set(x.shape[-2:]) <= lengths and x.shape[-3] > 1:  # masks have one head
            saved[x.data_ptr()] = x.shape
        return x

    counts = []
    for model in (make(dropout), make_fast(dropout)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(**batch()).loss
        counts.append(len(saved))
        del loss
    assert counts[0] > 0
    assert counts[1] == 0


def test_generates_the_same():
    inputs = {name: x for name, x in batch().items() if name != "labels"}
    options = {"max_new_tokens": 6, "output_scores": True, "return_dict_in_generate": True}
    expected, answer = (model.eval().generate(**inputs, **options) for model in (make(), make_fast()))
    assert torch.equal(answer.sequences, expected.sequences)
    for scores, expected_scores in zip(answer.scores, expected.scores, strict=True):
        torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-5)


def test_attentions_are_returned_when_asked_for_and_not_after():
    pixels = batch()["pixel_values"]
    stock, model = make().eval(), make_fast().eval()
    expected = stock.vision_model(pixels, output_attentions=True).attentions
    answer = model.vision_model(pixels, output_attentions=True).attentions
    assert len(answer) == 2
    for probabilities, expected_probabilities in zip(answer, expected, strict=True):
        assert torch.equal(probabilities, expected_probabilities)
    module = model.vision_model.encoder.layers[0].self_attn
    assert module._forward_hooks  # transformers', which stay
    assert module(torch.randn(2, N_PATCHES, 32))[1] is None


def test_text_attentions_are_returned_when_asked_for():
    ids, encoded = batch()["input_ids"], torch.ones(2, N_PATCHES, 32)
    expected, answer = (
        model.eval().text_decoder.bert(ids, encoder_hidden_states=encoded, is_decoder=True, output_attentions=True)
        for model in (make(), make_fast())
    )
    for name in ("attentions", "cross_attentions"):
        assert len(answer[name]) == 2
        for probabilities, expected_probabilities in zip(answer[name], expected[name], strict=True):
            torch.testing.assert_close(probabilities, expected_probabilities)


def test_hooks_on_the_dropout_see_the_probabilities():
    model, seen = make_fast(), []
    dropout = model.vision_model.encoder.layers[1].self_attn.dropout
    dropout.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model.vision_model(batch()["pixel_values"])
    assert seen == [(2, 2, N_PATCHES, N_PATCHES)]


def test_hooks_on_the_attention_see_what_they_would_of_stock():
    stock, model, seen = make(), make_fast(), []
    for blip in (stock, model):
        text = blip.text_encoder.encoder.layer[0].attention.self
        for module in (blip.vision_model.encoder.layers[1].self_attn, text):
            module.register_forward_hook(lambda module, args, output: seen.append(output[1]))
        blip(**batch())
    assert len(seen) == 4
    for probabilities, expected in zip(seen[2:], seen[:2], strict=True):
        torch.testing.assert_close(probabilities, expected)


def test_stand_back():
    model = make_fast()
    assert model.state_dict().keys() == make().state_dict().keys()
    fastln.restore(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in make().modules()]


def test_attention_whose_dropout_is_replaced_runs_as_stock_code():
    model = make_fast()
    want = model(**batch()).loss
    for module in model.modules():
        if isinstance(module, BlipAttention | BlipTextSelfAttention):
            module.dropout = torch.nn.Identity()
    torch.testing.assert_close(model(**batch()).loss, want)

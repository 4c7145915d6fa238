"""Where flash-attn is installed, padded batches reach it without their padding; shown on a CPU with a double of it."""

import pytest
import torch
from family_models import batch, make
from torch.nn import functional as F
from transformers import modeling_flash_attention_utils as flash

import fastln
from fastln.plan import apply, plan
from fastln.standins import attention as families
from fastln.standins.attention import FLASH_ATTENTION
from fastln.standins.tricks import TRICKS


class FlashAttention:
    """What of flash-attn transformers calls, by torch's own attention; counts the tokens that it is given."""

    def __init__(self):
        self.dense, self.packed = [], []

    def flash_attn_func(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        self.dense.append(q.shape[0] * q.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, None, dropout_p, causal, scale=softmax_scale, enable_gqa=True
        ).transpose(1, 2)

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False,
    ):  # fmt: skip
        self.packed.append(len(q))
        sequences = zip(*(x.split(cu_seqlens_q.diff().tolist()) for x in (q, k, v)), strict=True)
        n_dense = len(self.dense)
        out = [self.flash_attn_func(*(x[None] for x in qkv), dropout_p, softmax_scale, causal)[0] for qkv in sequences]
        del self.dense[n_dense:]
        return torch.cat(out)


@pytest.fixture
def installed(monkeypatch):
    fake = FlashAttention()
    settings = {
        "_loaded_implementation": FLASH_ATTENTION,
        "_flash_fn": fake.flash_attn_func,
        "_flash_varlen_fn": fake.flash_attn_varlen_func,
        "_pad_fn": flash._pad_input,
        "_unpad_fn": flash._unpad_input,
        "_process_flash_kwargs_fn": flash._lazy_define_process_function(fake.flash_attn_varlen_func),
    }
    for name, value in settings.items():
        monkeypatch.setattr(flash, name, value)
    monkeypatch.setattr(families, "is_flash_attn_2_available", lambda: True)
    return fake


def use_as_on_cuda(model):
    apply(plan(model, "full", without=TRICKS.keys() - {"attention"}, device="cuda"), model)


def step(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).float()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "name", ["bert", "roberta", "llama", "mistral", "qwen2", "gemma", "gpt2", "opt", "llava", "qwen2.5-vl"]
)
def test_text(name, padded, installed):
    model, inputs = make(name).bfloat16(), batch(name)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    n_tokens = inputs["input_ids"].numel()
    if padded:
        inputs["attention_mask"][1, -2:] = 0
        n_tokens -= 2
    loss, gradients = step(model, inputs)
    use_as_on_cuda(model)
    flash_loss, flash_gradients = step(model, inputs)
    assert (installed.packed if padded else installed.dense)[-2:] == [n_tokens] * 2
    assert flash_loss == pytest.approx(loss, rel=1e-2)
    assert (flash_gradients - gradients).norm() < 3e-2 * gradients.norm()
    fastln.restore(model)
    assert step(model, inputs)[0] == loss


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "clip", "siglip"])
def test_vision(name, installed):
    model, inputs = make(name).bfloat16(), batch(name)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    loss, gradients = step(model, inputs)
    use_as_on_cuda(model)
    flash_loss, flash_gradients = step(model, inputs)
    assert len(installed.dense) == (4 if name in ("clip", "siglip") else 2)
    assert flash_loss == pytest.approx(loss, rel=1e-2)
    assert (flash_gradients - gradients).norm() < 3e-2 * gradients.norm()


def test_a_model_whose_first_parameter_is_a_trained_norm_is_no_float32_model(installed):
    model = make("dinov2").dinov2.encoder.bfloat16()
    apply(plan(model, device="cuda"), model)
    assert next(model.parameters()).dtype == torch.float32
    assert model.config._attn_implementation == FLASH_ATTENTION

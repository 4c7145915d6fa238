"""Attention that branches on the name "sdpa", as sparse attention does, keeps that name and its numbers."""

import importlib

import pytest
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention

import fastln
from fastln.families.attention import depends_on_name
from fastln.standins.attention import NAME

SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    **{"index_topk": 4, "index_head_dim": 16, "index_n_heads": 2, "first_k_dense_replace": 1},
    **{"n_routed_experts": 2, "num_experts_per_tok": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
}
SPARSE = {
    "DeepseekV32": LATENT,
    "GlmMoeDsa": LATENT,
    "AXK2": LATENT,
    "MistralLarge4Text": LATENT,
    "MiniMaxM3VLText": {},
}


@pytest.mark.parametrize("family", SPARSE)
def test_logits_stay(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **SPARSE[family])
    head = getattr(transformers, f"{family}ForCausalLM", None)
    model = (head or getattr(transformers, f"{family}Model"))(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    ids = torch.randint(3, 60, (2, 24))
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False)[0]
        stays = [stay for stay in fastln.plan(model).stays if stay.kind == "attention"]
        got = fastln.prepare(model)(input_ids=ids, use_cache=False)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert any("depends on the attention name sdpa" in stay.reason for stay in stays)


@pytest.mark.parametrize(
    "family",
    ["deepseek_v32", "glm_moe_dsa", "axk2", "hy_v4", "dots3_note", "minimax_m3_vl", "mistral_large4", "falcon"],
)
def test_code_that_depends_on_the_name_is_found(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    classes = [value for name, value in vars(module).items() if name.endswith("Attention") and isinstance(value, type)]
    assert any(depends_on_name(cls) for cls in classes)


@pytest.mark.parametrize("cls", [BertSelfAttention, LlamaAttention, GPT2Attention])
def test_code_that_gives_the_name_to_the_interface_is_not(cls):
    assert depends_on_name(cls) is None


class Sparse(LlamaAttention):
    """Attention of somebody's own, which hands its choice over where it is not sdpa that computes."""

    def forward(self, hidden_states, **kwargs):
        if self.config._attn_implementation != "sdpa":
            kwargs["indices"] = torch.zeros(1)
        return super().forward(hidden_states, **kwargs)


def test_a_class_of_somebodys_own_is_looked_at_too():
    assert depends_on_name(Sparse) == "the code of Sparse depends on the attention name sdpa"


def test_an_argument_that_is_not_known_means_sdpa(caplog):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{key: SIZES[key] for key in SIZES if not key.startswith("moe")})
    model = fastln.prepare(transformers.LlamaForCausalLM(config))
    attention = model.model.layers[0].self_attn
    assert attention.config._attn_implementation == NAME
    x, positions = torch.randn(1, 6, 32, requires_grad=True), (torch.ones(1, 6, 16), torch.zeros(1, 6, 16))
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs),
        )
        attention(x, position_embeddings=positions, attention_mask=None)
        assert not calls
        attention(x, position_embeddings=positions, attention_mask=None, chosen_blocks=torch.zeros(1))
        attention(x, position_embeddings=positions, attention_mask=None, chosen_blocks=torch.zeros(1))
        assert len(calls) == 2
        attention(x, position_embeddings=positions, attention_mask=None, chosen_blocks=None)
        assert len(calls) == 2
    assert sum("'chosen_blocks'" in message for message in caplog.messages) == 1


def test_a_function_that_somebody_registers_as_sdpa_is_called():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{key: SIZES[key] for key in SIZES if not key.startswith("moe")})
    model = transformers.LlamaForCausalLM(config)
    calls = []

    def own(*args, **kwargs):
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    transformers.AttentionInterface.register("sdpa", own)
    try:
        stays = [stay for stay in fastln.plan(model).stays if stay.kind == "attention"]
        fastln.prepare(model)(input_ids=torch.randint(3, 60, (2, 24)))
    finally:
        transformers.AttentionInterface.register("sdpa", sdpa_attention_forward)
    assert {stay.reason for stay in stays} == {"another function is registered as sdpa"}
    assert len(calls) == 2

import copy
import json
import pickle

import pytest
import torch
from only import prepare_only
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    FalconConfig,
    FalconModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

import fastln
from fastln.plan import apply, plan
from fastln.standins import attention as families

# Weights so large that it matters what is attended to.
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
TEXT = LAYERS | {"intermediate_size": 48, "vocab_size": 50}
VISION = LAYERS | {"intermediate_size": 48, "image_size": 24, "patch_size": 8}


def make(family):
    """A tiny random bf16 model in training mode without dropout, and inputs with padding where it takes text."""
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 24, 24, dtype=torch.bfloat16)
    ids = torch.randint(0, 50, (2, 11))
    padding = torch.ones(2, 11, dtype=torch.long)
    padding[1, 7:] = 0
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if family == "dinov2":
        model, inputs = Dinov2Model(Dinov2Config(**VISION, mlp_ratio=2)), {"pixel_values": pixels}
    elif family == "vit":
        model, inputs = ViTModel(ViTConfig(**VISION)), {"pixel_values": pixels}
    elif family == "bert":
        model = BertModel(BertConfig(**TEXT, **no_dropout))
        inputs = {"input_ids": ids, "attention_mask": padding}
    elif family == "clip":
        text = TEXT | {"bos_token_id": 0, "eos_token_id": 49, "pad_token_id": 1}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16))
        inputs = {"input_ids": ids, "attention_mask": padding, "pixel_values": pixels, "return_loss": True}
    else:
        model = LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=2))
        inputs = {"input_ids": ids, "labels": ids}
        if family == "llama, padded":
            inputs["attention_mask"] = padding
    return model.to(torch.bfloat16).train(), inputs


def step(model, inputs):
    """The outputs that matter and every gradient, in float32."""
    model.zero_grad()
    output = model(**inputs)
    loss = getattr(output, "loss", None)
    loss = output.last_hidden_state.float().pow(4).mean() if loss is None else loss
    loss.backward()
    grads = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach().float(), grads


@pytest.mark.parametrize("family", ["dinov2", "vit", "bert", "clip", "llama", "llama, padded"])
def test_same_numbers_as_sdpa(family, monkeypatch):
    model, inputs = make(family)
    exact = make(family)[0].float()
    exact.load_state_dict(model.state_dict())
    exact_inputs = {key: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in inputs.items()}
    true_loss, truth = step(exact, exact_inputs)
    loss, grads = step(model, inputs)

    calls, factor = [], 1.0
    serve = families.attention

    def counted(query, *others, **options):
        calls.append(1)
        return serve(query * factor, *others, **options)

    def error(some):
        return torch.stack([(some[name] - truth[name]).norm() for name in truth]).norm()

    monkeypatch.setattr(families, "attention", counted)
    prepare_only(model, "attention")
    fast_loss, fast_grads = step(model, inputs)
    assert len(calls) == (4 if family == "clip" else 2)
    # Behind CLIP's attention come about eight roundings to bfloat16, each of half an ulp: of the projections, their
    # lengths, the logits, their logarithms, the mean. Either attention may come nearer to the truth by chance.
    ulp = torch.finfo(torch.bfloat16).eps * true_loss
    assert (fast_loss - true_loss).abs() <= (loss - true_loss).abs() + 4 * ulp
    assert fast_grads.keys() == grads.keys() == truth.keys()
    # Roundings are chance: where all gradients come through four logits, one way has up to twice the other's error.
    assert error(fast_grads) <= 2 * error(grads)

    # Float32 shows a wrong scale, which bfloat16's roundings can hide.
    prepare_only(exact, "attention")
    bound = 1e-5 * torch.stack([grad.norm() for grad in truth.values()]).norm()
    assert error(step(exact, exact_inputs)[1]) <= bound
    factor = 1.1
    assert error(step(exact, exact_inputs)[1]) > 10 * bound

    fastln.restore(model)
    calls.clear()
    _, restored_grads = step(model, inputs)
    assert not calls
    assert all(torch.equal(restored_grads[name], grads[name]) for name in grads)


def switched(model):
    """What attention is called in each module that asks the interface for it."""
    return [module.config._attn_implementation for module in model.modules() if families_attention(module)]


def families_attention(module):
    return (
        not isinstance(module, PreTrainedModel)
        and module.__class__.__name__.endswith("Attention")
        and hasattr(module, "config")
    )


def test_every_sub_model_is_switched_and_restored_and_its_configuration_stays():
    model, _ = make("clip")
    configs = [model.config, model.config.text_config, model.config.vision_config]
    held = [module.config for module in model.modules() if hasattr(module, "config")]
    prepare_only(model, "attention")
    assert switched(model) == ["fastln"] * 4
    assert [config._attn_implementation for config in configs] == ["sdpa"] * 3
    fastln.restore(model)
    assert all(a is b for a, b in zip(held, (m.config for m in model.modules() if hasattr(m, "config")), strict=True))


def test_a_model_of_the_same_configuration_stays_as_it_is():
    first, _ = make("llama")
    second = type(first)(first.config)
    fastln.prepare(first)
    assert switched(second) == ["sdpa"] * 2
    fastln.prepare(second)
    fastln.restore(first)
    assert switched(second) == ["fastln"] * 2
    assert switched(first) == ["sdpa"] * 2
    assert first.config is second.config


def test_a_view_shares_what_is_written_and_survives_copies():
    model = fastln.prepare(make("llama")[0])
    view = model.model.layers[0].self_attn.config
    assert isinstance(view, LlamaConfig)
    assert type(view).__name__ == "LlamaConfig"
    model.config.rms_norm_eps = 0.5
    assert view.rms_norm_eps == 0.5
    view.rms_norm_eps = 0.25
    assert model.config.rms_norm_eps == 0.25
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert switched(twin) == ["fastln"] * 2
        twin.config.rms_norm_eps = 0.125
        assert twin.model.layers[1].self_attn.config.rms_norm_eps == 0.125
        assert model.config.rms_norm_eps == 0.25
        fastln.restore(twin)
        assert twin.model.layers[1].self_attn.config is twin.config


def test_eager_stays_eager():
    model, _ = make("clip")
    model.set_attn_implementation({"text_config": "eager"})
    prepare_only(model, "attention")
    assert switched(model) == ["eager"] * 2 + ["fastln"] * 2
    model.set_attn_implementation("eager")
    assert switched(model) == ["eager"] * 4
    model.set_attn_implementation("sdpa")
    assert switched(model) == ["sdpa"] * 2 + ["fastln"] * 2


def test_models_inside_another_module():
    model = torch.nn.ModuleDict({"vision": make("vit")[0], "text": make("bert")[0]})
    prepare_only(model, "attention")
    assert switched(model) == ["fastln"] * 4


def test_own_attention_is_left_alone():
    falcon = FalconModel(FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=20))
    stays = [stay.reason for stay in plan(falcon).stays if stay.kind == "attention"]
    assert stays == ["it computes attention with its own code"]
    prepare_only(falcon, "attention")
    assert falcon.h[0].self_attention.config is falcon.config


def test_evaluation():
    model, inputs = make("vit")
    model.float().eval()
    inputs["pixel_values"] = inputs["pixel_values"].float()
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        prepare_only(model, "attention")
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_flash_attention_serves_where_it_is_installed(installed, dtype, monkeypatch):
    model = make("llama")[0].to(dtype)
    monkeypatch.setattr(families, "is_flash_attn_2_available", lambda: installed)
    apply(plan(model, device="cuda"), model)
    expected = "flash_attention_2" if installed and dtype == torch.bfloat16 else "sdpa"
    assert model.config._attn_implementation == expected
    assert switched(model) == [expected] * 2
    fastln.restore(model)
    assert model.config._attn_implementation == "sdpa"


def test_dropout_in_attention_keeps_no_mask_and_draws_again_in_checkpointing():
    model, inputs = make("bert")
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.2
    prepare_only(model, "attention")
    shapes = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.add(tuple(x.shape)) or x, lambda x: x):
        model(**inputs)
    assert (2, 4, 11) in shapes  # a number per head and query
    assert (2, 4, 11, 11) not in shapes
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        results.append(step(model, inputs))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], grad) for name, grad in results[1][1].items())
    torch.manual_seed(2)
    assert not torch.equal(step(model, inputs)[0], results[0][0])


def test_asking_for_attentions_does_what_sdpa_does():
    model, inputs = make("vit")
    expected = model(**inputs, output_attentions=True)
    prepare_only(model, "attention")
    output = model(**inputs, output_attentions=True)
    assert (output.attentions is None) == (expected.attentions is None)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)


def test_the_name_is_not_saved(tmp_path):
    model, _ = make("clip")
    prepare_only(model, "attention")
    model.save_pretrained(tmp_path)
    assert "fastln" not in (tmp_path / "config.json").read_text()
    assert "fastln" not in json.dumps(model.config.to_dict(), default=str)
    assert CLIPModel.from_pretrained(tmp_path).config.text_config._attn_implementation == "sdpa"


def test_generation_with_a_cache():
    model, inputs = make("llama")
    model.eval()
    prompt = inputs["input_ids"][:, :5]
    expected = model.generate(prompt, max_new_tokens=4, do_sample=False)
    prepare_only(model, "attention")
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), expected)

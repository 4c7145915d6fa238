"""Gradients of norms beside layers in 8 bits: as good as bfloat16's on encoders, and not spoilt by outliers."""

import pytest
import torch
import transformers
from family_models import NO_DROPOUT
from torch.nn.functional import cosine_similarity

import fastln
from fastln.data import load_dataset
from fastln.int8_rules import Int8Rules
from fastln.methods import norm_parameters
from fastln.models import load_task

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **TEXT, **NO_DROPOUT))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **TEXT))


def gpt2():
    sizes = {"n_embd": 128, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 160}
    config = transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(config)


def vit():
    sizes = {"image_size": 32, "patch_size": 8}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, **sizes, **NO_DROPOUT))


def with_outliers():
    """Return a BERT whose norms make a few columns much larger than the others, as trained ones do."""
    model = bert()
    with torch.no_grad():
        for name in norm_parameters(model):
            if name.endswith("LayerNorm.weight"):
                model.get_parameter(name)[7::50] *= 5
    return model


def gradients(make, **options):
    """Return the gradients of all norms, end to end."""
    torch.manual_seed(0)
    model = fastln.prepare(make(), backend="reference", **options)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 160, (4, 32), generator=generator)
    batch = {"input_ids": ids, "labels": ids}
    if make is vit:
        images = torch.randn(8, 3, 32, 32, generator=generator)
        batch = {"pixel_values": images, "labels": torch.arange(8) % 2}
    model(**batch).loss.backward()
    names = norm_parameters(model)
    return torch.cat([model.get_parameter(name).grad.flatten() for name in names])


def cosine(make):
    return cosine_similarity(gradients(make, products="int8"), gradients(make), dim=0).item()


@pytest.mark.parametrize(("make", "least"), [(bert, 0.9998), (gpt2, 0.9997), (vit, 0.999), (llama, 0.99)])
def test_gradients_have_the_exact_direction(make, least):
    assert cosine(make) > least


def test_outliers_do_not_spoil_gradients(monkeypatch):
    turned = cosine(with_outliers)
    monkeypatch.setattr(Int8Rules, "_turned", lambda self, name: False)
    plain = cosine(with_outliers)
    assert 1 - turned < (1 - plain) / 2


@pytest.mark.slow(take=0)
def test_gradients_of_real_towers_have_the_exact_direction(fastln_data):
    data = load_dataset(str(fastln_data / "data" / "vqa-rad"), "train")
    samples = data.samples[:64:8]
    towers = ",".join(str(fastln_data / "models" / name) for name in ("dinov2-small", "all-MiniLM-L6-v2"))

    def found(**options):
        task = load_task(f"dual:{towers}", data)
        model = fastln.prepare(task.model, **options).eval()
        model(**task.collate(samples, data)).loss.backward()
        names = norm_parameters(model)
        return torch.cat([model.get_parameter(name).grad.flatten() for name in names])

    assert cosine_similarity(found(products="int8"), found(), dim=0) > 0.999

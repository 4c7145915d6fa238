"""The predicted peak of a step against what torch's CPU allocator measures, for many models, methods and modes.

Any of these is exact to a few parts in a thousand. `scripts/plan_accuracy.py` measures models of real size.
"""

import gc
import os
import sys

import pytest
import torch
import transformers

from fastln.engines import put_method
from fastln.errors import FastLNError
from fastln.memory import AllocatorPeak
from fastln.peak import step_memory
from fastln.training import MasterAdamW
from fastln_kernels.cpu import library
from fastln_kernels.cpu import memory as allocator

needs_counts = pytest.mark.skipif(
    sys.platform != "linux" or not library.compiler() or os.environ.get("FASTLN_CPU_KERNELS") == "0",
    reason="no Linux, no compiler, or compiled kernels are switched off",
)
SIZES = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}
TEXT = {**SIZES, "vocab_size": 1000, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
VISION = {**SIZES, "image_size": 64, "patch_size": 8}
N_SAMPLES, N_TOKENS = 16, 96


def blip():
    text = {**TEXT, "encoder_hidden_size": SIZES["hidden_size"]}
    config = transformers.BlipConfig(text_config=text, vision_config=VISION)
    return transformers.BlipForQuestionAnswering(config)


MODELS = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=10)),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=10)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT | {"num_key_value_heads": 1})),
    "blip": blip,
}


def make(name, method, engine, dtype, products, activations, device):
    torch.manual_seed(0)
    with torch.device(device):
        model = MODELS[name]().to(getattr(torch, dtype)).train()
    settings = {"also": "classifier"} if method == "head" else {}
    if engine == "fastln":  # on the meta device nothing waits
        settings |= {"products": products, "activations": activations, "without": ("late_logits", "late_rows")}
    return put_method(model, method, engine, **settings)


def batch(name, dtype):
    ids = torch.randint(5, 1000, (N_SAMPLES, N_TOKENS))
    images = torch.randn(N_SAMPLES, 3, 64, 64, dtype=getattr(torch, dtype))
    if name == "llama":
        return {"input_ids": ids, "labels": ids}
    if name == "blip":
        question, answer = ids[:, :24], ids[:, 24:32]
        inputs = {"input_ids": question, "attention_mask": torch.ones_like(question), "pixel_values": images}
        return inputs | {"decoder_input_ids": answer, "labels": answer}
    inputs = {"pixel_values": images} if name == "vit" else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | {"labels": torch.zeros(N_SAMPLES, dtype=torch.int64)}


def measured(*combination):
    """The peak of a second step: then the optimizer has its moments, and whatever is made once is there."""
    gc.collect()
    with AllocatorPeak() as allocated:
        model = make(*combination, "cpu")
        inputs = batch(combination[0], combination[3])
        optimizer = MasterAdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
        for _ in range(2):
            allocated.reset()
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return allocated.bytes


COMBINATIONS = [
    ("vit", "layernorm", "fastln", "float32", "exact", "exact"),
    ("vit", "layernorm", "fastln", "bfloat16", "int8", "exact"),
    ("vit", "full", "torch", "float32", "exact", "exact"),
    ("vit", "head", "fastln", "float32", "exact", "exact"),
    ("bert", "layernorm", "fastln", "float32", "int8", "exact"),
    ("bert", "layernorm", "torch", "bfloat16", "exact", "exact"),
    ("bert", "full", "torch", "bfloat16", "exact", "exact"),
    ("bert", "lora", "peft", "float32", "exact", "exact"),
    ("llama", "layernorm", "fastln", "bfloat16", "exact", "exact"),
    ("llama", "layernorm", "torch", "float32", "exact", "exact"),
    ("llama", "lora", "fastln", "bfloat16", "int8", "exact"),
    ("llama", "lora", "peft", "bfloat16", "exact", "exact"),
    ("blip", "layernorm", "fastln", "float32", "exact", "exact"),
    ("blip", "layernorm", "fastln", "bfloat16", "int8", "exact"),
    ("blip", "full", "torch", "float32", "exact", "exact"),
    ("vit", "layernorm", "fastln", "float32", "exact", "recompute"),
    ("vit", "layernorm", "fastln", "bfloat16", "int8", "compressed-again"),
    ("bert", "layernorm", "fastln", "float32", "int8", "again"),
    ("bert", "layernorm", "fastln", "bfloat16", "exact", "compressed-2"),
    ("llama", "layernorm", "fastln", "float32", "exact", "checkpoint"),
    ("llama", "layernorm", "fastln", "bfloat16", "exact", "compressed"),
    ("blip", "layernorm", "fastln", "float32", "exact", "compressed-recompute"),
]


@needs_counts
def test_the_allocator_s_peak_is_that_of_tensors_and_forgets_what_was_before():
    with AllocatorPeak() as allocated:
        held = torch.ones(2**20)
        torch.ones(2**21)  # gone at once
        assert 12 * 2**20 <= allocated.bytes <= 12.1 * 2**20
        assert 4 * 2**20 <= allocated.live <= 4.1 * 2**20
        allocated.reset()
        torch.ones(2**18)
    torch.ones(2**22)
    assert 5 * 2**20 <= allocated.bytes <= 5.1 * 2**20
    assert allocated.kind == "CPU allocator peak"
    del held
    with allocated:  # again
        torch.ones(2**18)
    assert 2**20 <= allocated.bytes <= 1.1 * 2**20


def test_without_compiled_kernels_the_error_says_why(monkeypatch):
    monkeypatch.setattr(allocator, "why_not", lambda: "there is no compiler")
    with pytest.raises(FastLNError, match="cannot be counted: there is no compiler"), AllocatorPeak():
        pass


@needs_counts
@pytest.mark.slow(take=3)
@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_the_predicted_peak_is_what_the_allocator_measures(combination):
    dtype = combination[3]
    predicted = step_memory(make(*combination, "meta"), batch(combination[0], dtype))
    in_step = predicted.peak - predicted.weights - predicted.optimizer
    assert in_step > 0.4 * predicted.peak or combination[5] != "exact"  # activations count
    tolerance = 0.01 if combination[5] == "exact" else 0.02
    assert predicted.peak == pytest.approx(measured(*combination), rel=tolerance)

"""Language-model heads of whole models, lazy against stock: losses, all gradients, and no logits but the labels'."""

import copy

import pytest
import torch
import transformers
from tiny import SIZES, blip_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from fastln.families.head import use_lazy_head
from fastln.logits import LazyLogits
from fastln.modules import LMHead, stand_back

N_CLASSES = 160
N_TOKENS = 24
TEXT = {"vocab_size": N_CLASSES, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {**SIZES, **TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = {**SIZES, **TEXT, "num_key_value_heads": 1, "head_dim": 16}
GPT2 = {"vocab_size": N_CLASSES, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 1}
GPT2 = {**GPT2, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {**SIZES, **TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8}
QWEN_VISION = {**QWEN_VISION, "out_hidden_size": 32, "fullatt_block_indexes": [0], "window_size": 32}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
T5 = {"vocab_size": N_CLASSES, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}


def blip_answers():
    config = blip_config()
    config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = 0.0
    return transformers.BlipForQuestionAnswering(config)


def llava():
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**LLAMA),
        image_token_index=9,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen_vl():
    config = transformers.Qwen2_5_VLConfig(
        text_config={**LLAMA, "rope_parameters": ROPE},
        vision_config=QWEN_VISION,
        image_token_id=9,
        video_token_id=8,
        vision_start_token_id=7,
        vision_end_token_id=6,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def of(name, config, **settings):
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**settings))


MODELS = {
    "bert": of("BertForMaskedLM", "BertConfig", **BERT),
    "bert, causal": of("BertLMHeadModel", "BertConfig", **BERT, is_decoder=True),
    "bert, two losses": of("BertForPreTraining", "BertConfig", **BERT),
    "roberta": of("RobertaForMaskedLM", "RobertaConfig", **BERT),
    "llama": of("LlamaForCausalLM", "LlamaConfig", **LLAMA),
    "llama, tied": of("LlamaForCausalLM", "LlamaConfig", **LLAMA, tie_word_embeddings=True),
    "mistral": of("MistralForCausalLM", "MistralConfig", **LLAMA),
    "qwen2": of("Qwen2ForCausalLM", "Qwen2Config", **LLAMA),
    "gemma": of("GemmaForCausalLM", "GemmaConfig", **LLAMA),
    "gpt2": of("GPT2LMHeadModel", "GPT2Config", **GPT2),
    "gpt2, two heads": of("GPT2DoubleHeadsModel", "GPT2Config", **GPT2, summary_first_dropout=0.0),
    "opt": of("OPTForCausalLM", "OPTConfig", **OPT),
    "t5": of("T5ForConditionalGeneration", "T5Config", **T5, dropout_rate=0.0, decoder_start_token_id=0),
    "blip": blip_answers,
    "llava": llava,
    "qwen2.5-vl": qwen_vl,
}
# What these do to their logits has no lazy form; they compute them.
OTHERS = {"gemma2": of("Gemma2ForCausalLM", "Gemma2Config", **LLAMA, final_logit_softcapping=5.0)}


def make(name):
    torch.manual_seed(0)
    return {**MODELS, **OTHERS}[name]().train()


def batch(name):
    """2 x 12 tokens, four of them with labels; images where the model takes them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 150, (2, N_TOKENS // 2), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[0, 3:5], labels[1, 7:9] = ids[0, 3:5], ids[1, 7:9]
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if name == "bert, two losses":
        inputs["next_sentence_label"] = torch.tensor([0, 1])
    if name == "gpt2, two heads":
        return {"input_ids": ids[None], "labels": labels[None], "mc_labels": torch.tensor([1])}
    if name == "blip":
        inputs["decoder_input_ids"] = ids
        inputs["pixel_values"] = torch.randn(2, 3, 32, 32, generator=generator)
    if name == "llava":
        ids = torch.cat([torch.full((2, 17), 9), ids], 1)
        labels = torch.cat([torch.full((2, 17), -100), labels], 1)
        inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
        inputs["pixel_values"] = torch.randn(2, 3, 32, 32, generator=generator)
    if name == "qwen2.5-vl":
        ids[:, 0], ids[:, 1] = 7, 9  # one image of 16 x 16, in 2 x 2 patches merged to one token
        inputs["pixel_values"] = torch.randn(8, 3 * 2 * 8 * 8, generator=generator)
        inputs["image_grid_thw"] = torch.tensor([[1, 2, 2]] * 2)
        inputs["mm_token_type_ids"] = (ids == 9).int()
    return inputs


def step(model, inputs, **settings):
    """Return the outputs, and the loss and all gradients."""
    model.zero_grad()
    outputs = model(**inputs, **settings)
    loss = outputs.loss
    if hasattr(outputs, "mc_loss"):
        loss = loss + outputs.mc_loss
    loss.backward()
    return outputs, {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


class Logits(TorchDispatchMode):
    """Records the most rows of any tensor whose last dimension is the classes'; a transposed weight is none."""

    n_rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and not x.is_meta and x.shape[-1:] == (N_CLASSES,) and x.stride(-1) == 1:
                self.n_rows = max(self.n_rows, x.numel() // N_CLASSES)
        return result


def check(got, want):
    assert got.keys() == want.keys()
    for name, expected in want.items():
        error = (got[name].double() - expected).norm() / expected.double().norm().clamp_min(1e-12)
        assert error < 1e-5 or (got[name] - expected).abs().max() < 1e-9, name


@pytest.mark.parametrize("trains", ["all", "norms"])
@pytest.mark.parametrize("name", MODELS)
def test_families(name, trains):
    model, inputs = make(name), batch(name)
    for parameter in model.parameters():
        parameter.requires_grad_(trains == "all" or parameter.ndim == 1)
    keys, parameters = list(model.state_dict()), {n: id(p) for n, p in model.named_parameters()}
    with Logits() as made:
        stock_outputs, want = step(model, inputs)
    assert made.n_rows >= N_TOKENS - 2

    assert len(use_lazy_head(model)) == 1
    assert list(model.state_dict()) == keys
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    with Logits() as made:
        outputs, got = step(model, inputs)
    assert 0 < made.n_rows <= 4
    check(got, want)
    logits = {k: v for k, v in outputs.items() if isinstance(v, LazyLogits)}
    assert name == "blip" or len(logits) == 1
    for key, value in logits.items():
        torch.testing.assert_close(value + 0, stock_outputs[key])

    stand_back(model)
    assert not any(isinstance(module, LMHead) for module in model.modules())
    check(step(model, inputs)[1], want)


@pytest.mark.parametrize("name", OTHERS)
def test_logits_that_are_computed(name):
    model, inputs = make(name), batch(name)
    want = step(model, inputs)[1]
    use_lazy_head(model)
    check(step(model, inputs)[1], want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_smoothed_and_shifted(reduction):
    config = blip_config().text_config
    config.label_smoothing = 0.1
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    model, inputs = transformers.BlipTextLMHeadModel(config).train(), batch("")

    def losses():
        model.zero_grad()
        loss = model(**inputs, reduction=reduction).loss
        loss.pow(2).sum().backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    want = losses()
    use_lazy_head(model)
    with Logits() as made:
        check(losses(), want)
    assert made.n_rows == 4


def test_sums_over_several_batches():
    model, inputs = make("llama"), batch("llama")
    want = step(model, inputs, num_items_in_batch=torch.tensor(37))[1]
    use_lazy_head(model)
    with Logits() as made:
        check(step(model, inputs, num_items_in_batch=torch.tensor(37))[1], want)
    assert made.n_rows == 4


def test_nothing_waits_outside_of_training():
    model, inputs = make("llama"), batch("llama")
    use_lazy_head(model)
    with torch.no_grad():
        assert type(model(**inputs).logits) is torch.Tensor
    model.eval()
    assert type(model(**inputs).logits) is torch.Tensor
    generated = model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
    assert torch.equal(model.train().generate(inputs["input_ids"], max_new_tokens=3, do_sample=False), generated)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model, inputs = make("llama"), batch("llama")
    want = step(model, inputs)[1]
    use_lazy_head(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    check(step(model, inputs)[1], want)


def test_copies():
    model, inputs = make("bert"), batch("bert")
    want = step(model, inputs)[1]
    use_lazy_head(model)
    twin = copy.deepcopy(model)
    check(step(twin, inputs)[1], want)
    assert isinstance(twin.get_output_embeddings(), LMHead)


def test_bfloat16_is_no_further_from_float64():
    exact = step(make("llama").double(), batch("llama"))[1]
    model, inputs = make("llama").bfloat16(), batch("llama")
    stock = step(model, inputs)[1]
    use_lazy_head(model)
    lazy = step(model, inputs)[1]

    def error(of):
        pairs = [(of[name].double(), expected) for name, expected in exact.items()]
        return sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)

    assert lazy["loss"].dtype == stock["loss"].dtype
    assert error(lazy) < 1.1 * error(stock)


def trained(model, folder, **settings):
    data = [{k: v[i] for k, v in batch("llama").items()} for i in (0, 1) * 4]
    arguments = TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], logging_steps=1,
        use_cpu=True, disable_tqdm=True, save_strategy="no", **settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2])
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log] + [trainer.evaluate()["eval_loss"]]


@pytest.mark.parametrize(
    "settings",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"label_smoothing_factor": 0.1}],
    ids=["float32", "autocast", "accumulated", "smoothed by the trainer"],
)
def test_trainer(settings, tmp_path):
    model, stock = make("llama"), make("llama")
    use_lazy_head(model)
    got, want = trained(model, tmp_path, **settings), trained(stock, tmp_path, **settings)
    torch.testing.assert_close(got, want, rtol=2e-2 if "bf16" in settings else 1e-4, atol=0)

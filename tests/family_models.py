"""A tiny random model of each of transformers' families, and a batch that it takes."""

import torch
import transformers
from tiny import SIZES, blip_config

N_CLASSES = 160
N_TOKENS = 24
TEXT = {"vocab_size": N_CLASSES, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {**SIZES, **TEXT, **NO_DROPOUT}
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
    "gemma2": of("Gemma2ForCausalLM", "Gemma2Config", **LLAMA, final_logit_softcapping=5.0),
    "cohere": of("CohereForCausalLM", "CohereConfig", **LLAMA, logit_scale=0.25),
    "granite": of("GraniteForCausalLM", "GraniteConfig", **LLAMA, logits_scaling=3.0),
    "gpt2": of("GPT2LMHeadModel", "GPT2Config", **GPT2),
    "gpt2, two heads": of("GPT2DoubleHeadsModel", "GPT2Config", **GPT2, summary_first_dropout=0.0),
    "opt": of("OPTForCausalLM", "OPTConfig", **OPT),
    "t5": of("T5ForConditionalGeneration", "T5Config", **T5, dropout_rate=0.0, decoder_start_token_id=0),
    "blip": blip_answers,
    "llava": llava,
    "qwen2.5-vl": qwen_vl,
}
VISION_MODELS = {
    "vit": of("ViTForImageClassification", "ViTConfig", **VISION, **NO_DROPOUT),
    "deit": of("DeiTForImageClassification", "DeiTConfig", **VISION, **NO_DROPOUT),
    "dinov2": of("Dinov2ForImageClassification", "Dinov2Config", **VISION, **NO_DROPOUT),
    "dinov2, swiglu": of("Dinov2ForImageClassification", "Dinov2Config", **VISION, **NO_DROPOUT, use_swiglu_ffn=True),
    "clip": of("CLIPModel", "CLIPConfig", text_config={**SIZES, **TEXT}, vision_config=VISION),
    "siglip": of("SiglipModel", "SiglipConfig", text_config={**SIZES, **TEXT}, vision_config=VISION),
}


def make(name, seed=0):
    torch.manual_seed(seed)
    return {**MODELS, **VISION_MODELS}[name]().train()


def cut_dropout(model):
    """Have `model`, of any family, drop nothing: neither elements nor paths nor layers."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in name or isinstance(module, torch.nn.Dropout)):
                setattr(module, name, 0.0)
    return model


def batch(name):
    """2 x 12 tokens, four of them with labels; images where the model takes them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 150, (2, N_TOKENS // 2), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[0, 3:5], labels[1, 7:9] = ids[0, 3:5], ids[1, 7:9]
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    if name in VISION_MODELS:
        images = torch.randn(2, 3, 32, 32, generator=generator)
        if name in ("clip", "siglip"):
            return {
                "pixel_values": images,
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "return_loss": True,
            }
        return {"pixel_values": images, "labels": torch.tensor([0, 1])}
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

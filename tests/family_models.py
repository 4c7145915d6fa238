"""Tiny random models of transformers' families, and a batch that each takes."""

import torch
import transformers
from tiny import SIZES, WIDTH, blip_config

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


# One size by all the names that configurations have for it; each takes those that it knows.
ANY_SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "d_ff", "hidden_dim", "ffn_dim"), 2 * WIDTH),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 2 * WIDTH),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv"), WIDTH // 2),
    **{"vocab_size": 100, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
IMAGE = {**SIZES, "image_size": 32, "patch_size": 8}
STAGES = {"depths": [1, 1], "hidden_sizes": [16, 32], "image_size": 32}
EXPERTS = {"moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
LATENT |= {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 2, "first_k_dense_replace": 1}
SPEECH = {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_conv_pos_embedding_groups": 4}
SPEECH |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "mask_time_prob": 0.0, "mask_feature_prob": 0.0}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}

# What a model is an example of: its class, its configuration's class, and what its configuration has beside ANY_SIZES.
KINDS = {
    "post-norm encoder": ("BertForMaskedLM", "BertConfig", {}),
    "shared layers": ("AlbertForMaskedLM", "AlbertConfig", {}),
    "quantised norms": ("IBertForMaskedLM", "IBertConfig", {}),
    "disentangled attention": ("DebertaV2ForMaskedLM", "DebertaV2Config", {"relative_attention": True}),
    "pre-norm encoder": ("ModernBertForMaskedLM", "ModernBertConfig", {"local_attention": 8}),
    "no attention": ("FNetForMaskedLM", "FNetConfig", {}),
    "pre-norm decoder": ("LlamaForCausalLM", "LlamaConfig", {}),
    "fused projections": ("GPT2LMHeadModel", "GPT2Config", {}),
    "parallel blocks": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {"use_parallel_residual": True}),
    "ALiBi": ("BloomForCausalLM", "BloomConfig", {}),
    "ALiBi, one key head": ("FalconForCausalLM", "FalconConfig", {"alibi": True, "multi_query": True}),
    "norm with offset": ("GemmaForCausalLM", "GemmaConfig", {}),
    "norms around": ("Gemma2ForCausalLM", "Gemma2Config", {"sliding_window": 8}),
    "LayerNorm with offset": ("NemotronForCausalLM", "NemotronConfig", {}),
    "norm without bias": ("CohereForCausalLM", "CohereConfig", {"logit_scale": 0.25, "use_qk_norm": True}),
    "experts": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 2}),
    "sparse attention": (
        "DeepseekV32ForCausalLM",
        "DeepseekV32Config",
        {**LATENT, **EXPERTS, "n_routed_experts": 2, "num_experts_per_tok": 2},
    ),
    "attention sinks": ("GptOssForCausalLM", "GptOssConfig", {"num_local_experts": 2, "num_experts_per_tok": 2}),
    "SSM": ("MambaForCausalLM", "MambaConfig", {"state_size": 8}),
    "SSM, norms inside": ("FalconMambaForCausalLM", "FalconMambaConfig", {"state_size": 8}),
    "hybrid": ("BambaForCausalLM", "BambaConfig", {**MAMBA2, "attn_layer_indices": [1]}),
    "relative bias": ("T5ForConditionalGeneration", "T5Config", {"decoder_start_token_id": 0}),
    "post-norm encoder-decoder": ("BartForConditionalGeneration", "BartConfig", {"decoder_start_token_id": 1}),
    "tokens first": ("FSMTModel", "FSMTConfig", {"langs": ["en", "de"], "src_vocab_size": 100, "tgt_vocab_size": 100}),
    "vision": ("ViTForImageClassification", "ViTConfig", IMAGE),
    "layer scale": ("BeitForImageClassification", "BeitConfig", {**IMAGE, "use_relative_position_bias": True}),
    "windows": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "convolutions": ("ConvNextForImageClassification", "ConvNextConfig", {**STAGES, "num_stages": 2}),
    "convolutions and attention": (
        "CvtForImageClassification",
        "CvtConfig",
        {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]},
    ),
    "segmentation": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {**STAGES, "num_encoder_blocks": 2, "num_attention_heads": [1, 2], "decoder_hidden_size": 16},
    ),
    "detection": (
        "YolosForObjectDetection",
        "YolosConfig",
        {**IMAGE, "image_size": [32, 32], "num_detection_tokens": 4},
    ),
    "audio": ("ASTForAudioClassification", "ASTConfig", {**SIZES, "max_length": 32, "num_mel_bins": 16}),
    "speech encoder": ("Wav2Vec2ForCTC", "Wav2Vec2Config", SPEECH),
    "speech encoder-decoder": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32, "decoder_start_token_id": 1},
    ),
    "two towers": ("CLIPModel", "CLIPConfig", {"text_config": {**SIZES, **TEXT}, "vision_config": VISION}),
    "Q-Former": (
        "Blip2ForConditionalGeneration",
        "Blip2Config",
        {
            "vision_config": {**SIZES, "image_size": 32, "patch_size": 8},
            "qformer_config": {**SIZES, "vocab_size": 100, "encoder_hidden_size": WIDTH},
            "text_config": {**OPT, "model_type": "opt"},
            "num_query_tokens": 4,
            "image_token_index": 9,
        },
    ),
    "vision-language": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "text_config": {**LLAMA, "model_type": "llama"},
            "image_token_index": 9,
            "vision_feature_select_strategy": "full",
        },
    ),
}


def of_kind(kind, seed=0):
    """Return a model of a kind, which drops nothing, and its inputs without and with labels."""
    name, config, settings = KINDS[kind]
    sizes = {} if settings.keys() & {"depths", "text_config", "embed_dim"} else dict(ANY_SIZES)
    if config == "FalconConfig":
        del sizes["head_dim"]
    torch.manual_seed(seed)
    made = getattr(transformers, config)(**{**sizes, **settings})
    model = cut_dropout(getattr(transformers, name)(made).train())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)  # so that layers count beside the residual stream
    return model, *_inputs(name, model)


def _inputs(name, model):
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(10, 90, (2, 16), generator=generator), None
    images = torch.randn(2, 3, 32, 32, generator=generator)
    if name.startswith("Wav2Vec2"):
        return {"input_values": torch.randn(2, 400, generator=generator)}, ids[:, :4]
    if name.startswith("AST"):
        return {"input_values": torch.randn(2, 32, 16, generator=generator)}, torch.tensor([0, 1])
    if name.startswith("Whisper"):
        return {"input_features": torch.randn(2, 8, 40, generator=generator), "decoder_input_ids": ids[:, :6]}, ids[
            :, :6
        ].clone()
    if name.startswith("CLIP"):
        return {"input_ids": ids, "pixel_values": images}, None
    if name.startswith(("Llava", "Blip2")):
        n_tokens = 17 if name.startswith("Llava") else 4
        ids = torch.cat([torch.full((2, n_tokens), 9), ids], 1)
        return {"input_ids": ids, "pixel_values": images}, torch.where(ids == 9, -100, ids)
    if model.main_input_name == "pixel_values":
        if "Segmentation" in name:
            labels = torch.randint(0, 2, (2, 32, 32), generator=generator)
        elif "Classification" in name:
            labels = torch.tensor([0, 1])
        return {"pixel_values": images}, labels
    inputs = {"input_ids": ids}
    if not name.startswith(("Mamba", "FalconMamba", "FNet")):
        inputs["attention_mask"] = (torch.arange(16) < torch.tensor([[16], [12]])).long()
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :8]
        return inputs, ids[:, :8].contiguous() if "Generation" in name else None
    return inputs, torch.where(torch.arange(16) < 11, -100, ids)

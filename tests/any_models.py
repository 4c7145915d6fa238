"""Models of a hundred classes that fastln knows nothing of in particular, a batch for each, and a step."""

import pytest
import torch
import transformers
from family_models import ANY_SIZES as SIZES
from family_models import cut_dropout

TEXT = """
    Albert Apertus Arcee Bart BioGpt BitNet Blenderbot Bloom Camembert Canine Cohere Cohere2 ConvBert CTRL
    Data2VecText Deberta DebertaV2 DistilBert Electra Ernie Ernie4_5 Exaone4 Falcon Flaubert FNet Gemma2 Gemma3Text
    Glm Glm4 GPTBigCode GPTNeoX GptOss Granite Helium HunYuanDenseV1 LayoutLM Lfm2 Llama4Text Longformer LongT5
    M2M100 Mamba Marian MBart MegatronBert Mixtral MobileBert ModernBert MPNet Mpt MT5 Nemotron Nystromformer Olmo2
    OPT Pegasus Persimmon Phi Phi3 PLBart Qwen2Moe Qwen3 RobertaPreLayerNorm RoFormer Rwkv SeedOss SmolLM3 Splinter
    SqueezeBert StableLm Starcoder2 UMT5 XGLM XLM XLMRoberta
"""
VISION = """
    Aimv2Vision AltCLIPVision Beit Blip2Vision BlipVision ChineseCLIPVision CLIPVision Cvt Data2VecVision DeiT
    Dinov2 Dinov2WithRegisters DINOv3ViT FocalNet GitVision IJepa InstructBlipVision OwlViTVision PixtralVision Pvt
    PvtV2 Segformer SiglipVision Swinv2 ViT ViTMAE ViTMSN
"""
_TAKES_NO_MASK = ("CTRL", "FNet", "Mamba", "Rwkv")


def make(name, settings):
    torch.manual_seed(0)
    config, model = (getattr(transformers, name + kind) for kind in ("Config", "Model"))
    return cut_dropout(model(config(**settings)).train())


def text(name):
    try:
        model = make(name, SIZES)
    except Exception:  # configurations that refuse what is no business of theirs
        model = make(name, {k: v for k, v in SIZES.items() if k not in ("head_dim", "d_kv", "num_key_value_heads")})
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids}
    if name not in _TAKES_NO_MASK:
        inputs["attention_mask"] = (torch.arange(16) < torch.tensor([[16], [12]])).long()
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return model, inputs


def vision(name):
    sizes = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    try:
        model = make(name, {**sizes, "image_size": 32, "patch_size": 8})
    except Exception:  # stages instead of layers
        model = make(name, {"image_size": 32})
    return model, {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


NAMES = [*TEXT.split(), *VISION.split()]


def any_model(name):
    """Return a small model and a batch for it."""
    return (text if name in TEXT.split() else vision)(name)


def step(model, inputs):
    """Return a loss that weighs all outputs differently, and the norms' gradients."""
    model.zero_grad()
    torch.manual_seed(1)  # what models draw that is no dropout
    out = model(**inputs)[0]
    loss = (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(got, want, tolerance=1e-5):
    assert got[0] == pytest.approx(want[0], rel=2 * tolerance, abs=1e-8)
    assert got[1].keys() == want[1].keys()
    error = sum((got[1][name] - gradient).square().sum() for name, gradient in want[1].items())
    assert error.sqrt() <= tolerance * sum(gradient.square().sum() for gradient in want[1].values()).sqrt()

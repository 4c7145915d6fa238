"""Small models whose frozen linear layers are large enough for 8 bits: an encoder and two language models."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert(dtype=torch.float32):
    torch.manual_seed(0)
    config = BertConfig(**SIZES, vocab_size=99, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(config).to(dtype)


def gpt2(n_words=99):
    torch.manual_seed(0)
    sizes = {"n_embd": 128, "n_layer": 2, "n_head": 2, "vocab_size": n_words, "n_positions": 32}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **drops))


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=99)).to(dtype)

"""Tokenizers of the kinds that models that chat have, trained on a few sentences, and chat templates like theirs."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

IMAGE = "<image>"
_TEXTS = [
    "USER: What is shown? ASSISTANT: An MRI of the knee.",
    "Is it normal? Yes. No effusion,\n\nI am (almost) not sure\nuser <think>|[INST] /",
]

# LLaVA 1.5's: parts, and no token that ends an answer.
LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Mistral's: text alone, a blank before the answer's end or not, and the first token in the template.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Qwen's: turns that end alike, a system prompt, a line break behind each; an image within its marks.
CHATML = (
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
)
# Qwen3's: what stands before an answer depends on whether it is the last one.
THINKING = CHATML.replace(
    "{% if message['content'] is string %}",
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% if message['content'] is string %}",
)
TEMPLATES = {"plain": None, "llava": LLAVA, "mistral": MISTRAL, "chatml": CHATML, "thinking": THINKING}


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's and Qwen's kind: bytes, a blank belongs to the word behind it, nothing is added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(tokenizer, trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False))


def metaspace() -> PreTrainedTokenizerFast:
    """Llama's and Mistral's kind: a blank is a letter, one stands before the text, and <s> before all."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    made = _trained(tokenizer, trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"], show_progress=False))
    begin = ("<s>", made.convert_tokens_to_ids("<s>"))
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    return made


def _trained(tokenizer: Tokenizer, trainer: trainers.BpeTrainer) -> PreTrainedTokenizerFast:
    tokenizer.train_from_iterator(_TEXTS * 4, trainer)
    special = ["<s>", "</s>", "<pad>", IMAGE, "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


TOKENIZERS = {"byte level": byte_level, "metaspace": metaspace}

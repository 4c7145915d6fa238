"""Word-level tokenizers made from a dataset's words, for models that are a bare configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fastln.errors import FastLNError

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def word_tokenizer(
    texts: Iterable[str], vocab_size: int, *, pad_id: int = 0, sep_id: int | None = None, taken: Iterable[int] = ()
) -> PreTrainedTokenizerFast:
    """Make a tokenizer of the most frequent words.

    Args:
        texts: the source of the words.
        vocab_size: how many ids the model has; words without an id become [UNK].
        pad_id: the id that the model's configuration gives to padding.
        sep_id: the id that the model's configuration gives to the end of a text; any free one by default.
        taken: further ids that the configuration gives a meaning to.

    Returns:
        A tokenizer for lower-cased words, whose texts end with [SEP].

    Raises:
        FastLNError: if the model has too few ids for the special tokens.
    """
    ids = dict.fromkeys(SPECIAL.values()) | {"[PAD]": pad_id, "[SEP]": sep_id}
    tokenizer = _word_level(texts, vocab_size, ids, "[UNK]", taken)
    sep_id = tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", sep_id)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def chat_tokenizer(
    texts: Iterable[str], vocab_size: int, ids: Mapping[str, int | None], *, further: Mapping[str, int | None]
) -> PreTrainedTokenizerFast:
    """Make a tokenizer of the most frequent words for a conversational model.

    Args:
        texts: the source of the words.
        vocab_size: how many ids the model has; words without an id become <unk>.
        ids: the ids that the model's configuration gives to `bos_token`, `eos_token` and `pad_token`; None: a free id.
        further: further special tokens, such as an image's, with their ids.

    Raises:
        FastLNError: if an id is not among those that the model has, or there are too few for the special tokens.
    """
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    special: dict[str, int | None] = {}
    for role, index in ids.items():
        same = next((token for token, other in special.items() if other is not None and other == index), None)
        named[role] = same or named[role]
        special[named[role]] = index
    special |= {"<unk>": None, **further}
    tokenizer = _word_level(texts, vocab_size, special, "<unk>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=list(further), **named
    )


def _word_level(
    texts: Iterable[str], vocab_size: int, special: Mapping[str, int | None], unknown: str, taken: Iterable[int] = ()
) -> Tokenizer:
    """Return a tokenizer for lower-cased words; special tokens get the given ids, or free ones if None."""
    vocab = {token: index for token, index in special.items() if index is not None}
    if outside := [token for token, index in vocab.items() if not 0 <= index < vocab_size]:
        raise FastLNError(
            f"the configuration gives {outside[0]} the id {vocab[outside[0]]}, but its vocabulary has {vocab_size} ids"
        )
    used = set(vocab.values()) | set(taken)
    free = (index for index in range(vocab_size) if index not in used)
    normalizer = normalizers.Lowercase()
    split = pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text)))
    try:
        for token in special:
            if token not in vocab:
                vocab[token] = next(free)
    except StopIteration:
        raise FastLNError(f"a vocabulary of {vocab_size} ids has no room for the special tokens") from None
    # Most frequent first, ties in alphabetical order, so that the ids are always the same.
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    vocab |= {word: index for (word, _), index in zip(ranked, free, strict=False)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token=unknown))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split
    return tokenizer

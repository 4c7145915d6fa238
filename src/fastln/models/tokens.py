"""A word-level tokenizer made from a dataset's own words, for models that come as a bare configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

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
        texts: what the words are taken from.
        vocab_size: how many ids the model has; words that find none become [UNK].
        pad_id: the id that the model's configuration gives to padding.
        sep_id: the id that the model's configuration gives to the end of a text; any free one by default.
        taken: further ids that the configuration gives a meaning to.

    Returns:
        A tokenizer for lower-cased words, whose texts end with [SEP].

    Raises:
        FastLNError: if the model has too few ids for the special tokens.
    """
    special = {"[PAD]": pad_id} | ({} if sep_id is None else {"[SEP]": sep_id})
    used = set(special.values()) | set(taken)
    free = (index for index in range(vocab_size) if index not in used)
    normalizer = normalizers.Lowercase()
    split = pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text)))
    vocab = dict(special)
    try:
        for token in SPECIAL.values():
            if token not in vocab:
                vocab[token] = next(free)
    except StopIteration:
        raise FastLNError(f"a vocabulary of {vocab_size} ids has no room for the special tokens") from None
    # The most frequent first; equal counts in alphabetical order, so that the ids are the same every time.
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    vocab |= {word: index for (word, _), index in zip(ranked, free, strict=False)}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", special_tokens=[("[SEP]", vocab["[SEP]"])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)

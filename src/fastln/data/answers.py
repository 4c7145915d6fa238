"""Answers as text: which answers count as equal, and the vocabulary of answers that a classifier chooses from."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

import regex

from fastln.errors import FastLNError
from fastln.ops.linear_cross_entropy import IGNORE_INDEX

UNKNOWN = IGNORE_INDEX
"""The index of an answer outside the vocabulary; the loss ignores it."""

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー々〆\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""Letters of scripts that put no blanks between words, for a set in a regular expression."""

_IDEOGRAPHS = r"\p{Han}\p{Hiragana}\p{Katakana}ー々〆"
_NEEDLESS_BLANK = regex.compile(rf"(?<=[{_IDEOGRAPHS}]) | (?=[{_IDEOGRAPHS}])")
_SURROUNDING = r"[\p{Terminal_Punctuation}\p{Quotation_Mark}`\s¡¿״׳]"
_SURROUNDED = regex.compile(rf"^{_SURROUNDING}+|{_SURROUNDING}+$")
_PIECE = regex.compile(rf"(?V1)[{UNSPACED}]\p{{M}}*|[^{UNSPACED}]+")
_INVISIBLE = regex.compile(r"\p{Cf}")
_DASH = regex.compile(r"[\p{Pd}−]")
_DIGIT = regex.compile(r"\p{Nd}")
_SAME_MARKS = str.maketrans({"‘": "'", "’": "'", "ʼ": "'", "“": '"', "”": '"', "。": ".", "、": ","})


def canonical(text: str) -> str:
    """Return a text in the one spelling that stands for all that look and mean the same.

    Case is folded, and compatible forms are made one (Unicode's NFKC): composed and decomposed accents, full-width and
    half-width letters. Dashes, apostrophes, quotation marks, ideographic commas and stops, and the digits of all
    scripts become ASCII's. Invisible characters go. Of ASCII text only the case changes.
    """
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text))
    text = unicodedata.normalize("NFKC", text.casefold())  # folding may decompose
    text = _DASH.sub("-", text.translate(_SAME_MARKS))
    return _DIGIT.sub(lambda digit: str(unicodedata.decimal(digit[0])), text)


def normalise_answer(text: str) -> str:
    """Normalise an answer for comparison.

    In this order: take its `canonical` spelling; replace runs of white space by one blank, and by none beside Chinese
    and Japanese letters; strip blanks, quotation marks and the marks that end phrases, of any script, from both ends
    (in ASCII ``. , ; : ! ? " ' ` ``). Nothing else changes: `5%`, `X-ray` and `(CN V)` keep their signs; `Yes.` and
    `" yes"` become `yes`.
    """
    text = " ".join(canonical(text).split())
    if not text.isascii():
        text = _NEEDLESS_BLANK.sub("", text)
    return _SURROUNDED.sub("", text)


def answer_words(text: str) -> list[str]:
    """Return the words of an answer, each normalised; letters of scripts without blanks between words are words."""
    parts = normalise_answer(text).split()
    pieces = [piece for part in parts for piece in ([part] if part.isascii() else _PIECE.findall(part))]
    return [word for piece in pieces if (word := normalise_answer(piece))]


class AnswerVocabulary:
    """The answers that a classifier chooses from, by index.

    Args:
        answers: Normalised answers, all different, in the order of their indices.

    Raises:
        FastLNError: `answers` is empty, or one of them is.
    """

    def __init__(self, answers: Iterable[str]) -> None:
        self._answers = tuple(answers)
        if not self._answers:
            raise FastLNError("the answer vocabulary is empty: the training data has no answers")
        if "" in self._answers:
            raise FastLNError(
                f"answer {self._answers.index('')} of the answer vocabulary, counted from 0, is the empty text ''; "
                "an answer needs more than blanks and punctuation"
            )
        self._indices: dict[str, int] = {}
        for index, answer in enumerate(self._answers):  # normalised, for vocabularies saved by older versions
            self._indices.setdefault(normalise_answer(answer), index)

    @classmethod
    def build(cls, answers: Iterable[str]) -> AnswerVocabulary:
        """Make the vocabulary of training answers: normalised, most frequent first, ties sorted by text.

        Raises:
            FastLNError: There are no answers, or one of them is empty after normalising.
        """
        counts = Counter(normalise_answer(answer) for answer in answers)
        return cls(sorted(counts, key=lambda answer: (-counts[answer], answer)))

    def index(self, answer: str) -> int:
        """Return the index of an answer, which need not be normalised; `UNKNOWN` if the vocabulary lacks it."""
        return self._indices.get(normalise_answer(answer), UNKNOWN)

    def __getitem__(self, index: int) -> str:
        return self._answers[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._answers)

    def __len__(self) -> int:
        return len(self._answers)

"""Writes conversations as text with a model's own chat template, and finds the answers in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastln.errors import FastLNError

PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""For models without a chat template: LLaVA's form, `USER: question ASSISTANT: answer</s>`, without a system prompt."""

_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters: no text has them, and templates pass them through
_MARK = re.compile(f"{_OPEN}[0-9]+{_CLOSE}")

Turn = tuple[str, str]
"""A question and its answer."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as the model reads it.

    Attributes:
        text: the conversation, up to the end of the last answer.
        answers: the span of each answer in the text, up to the end of its end token. Blanks before an answer belong to
            it, as they belong to its first token with most tokenizers. So the text before does not depend on it.
    """

    text: str
    answers: tuple[tuple[int, int], ...]


class ChatTemplate:
    """Writes conversations in the form that a model is trained on.

    To find the answers, the conversation is also rendered with marks in their place. The two texts must otherwise be
    equal, so no template can silently put other text under the labels.

    Args:
        tokenizer: knows the special tokens.
        template: the chat template (Jinja); None for `PLAIN`.
        image_token: the token of an image in the text; None for models that read only text.
        placeholder: an image's place, with its token, if the template takes text instead of parts.

    Attributes:
        source: the template.
        end: the token that ends an answer: the one that the template puts there, or the tokenizer's end token.

    Raises:
        FastLNError: the template cannot be rendered or leaves out images, or no token can end an answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        image_token: str | None = None,
        placeholder: str = "",
    ) -> None:
        if not template and tokenizer.eos_token is None:
            raise FastLNError(f"{tokenizer.name_or_path or 'the tokenizer'}: it has no end token to end an answer with")
        self.source = template or PLAIN
        self._tokenizer = tokenizer
        self._image_token = image_token
        self._placeholder = placeholder
        self._in_parts = image_token is not None and self._takes_parts(image_token)
        self.end = self._end()

    def write(self, turns: Sequence[Turn], image_lengths: Sequence[int] = ()) -> Conversation:
        """Write a conversation.

        Args:
            turns: the questions with their answers.
            image_lengths: how many tokens each image takes; images stand before the first question.

        Raises:
            FastLNError: the template changes answers instead of only placing them, or the conversation contains the
                model's own image token.
        """
        answers = [answer for _, answer in turns]
        n_images = len(image_lengths)
        marked = [(question, f"{_OPEN}{number}{_CLOSE}") for number, (question, _) in enumerate(turns)]
        pieces = _MARK.split(self._render(marked, n_images))
        whole = "".join(piece + answer for piece, answer in zip(pieces, [*answers, ""], strict=False))
        if len(pieces) != len(turns) + 1 or whole != self._render(turns, n_images):
            raise FastLNError("the chat template changes answers, so fastln cannot find them in the text")
        if self._image_token is not None and whole.count(self._image_token) != n_images:
            raise FastLNError(
                f"the conversation has {whole.count(self._image_token)} times {self._image_token} and {n_images} images"
            )
        text, places = self._expanded(pieces[0], image_lengths), []
        for answer, after in zip(answers, pieces[1:], strict=True):
            start = len(text.rstrip(" "))
            blanks = len(after) - len(after.lstrip())
            closed = blanks + len(self.end) if after.startswith(self.end, blanks) else 0
            text += answer + (after[:closed] or self.end)
            places.append((start, len(text)))
            text += after[closed:]
        return Conversation(text[: places[-1][1]], tuple(places))

    def _expanded(self, text: str, image_lengths: Sequence[int]) -> str:
        if not image_lengths or self._image_token is None:
            return text
        before, *between = text.split(self._image_token)
        return before + "".join(
            self._image_token * length + rest for length, rest in zip(image_lengths, between, strict=True)
        )

    def _render(self, turns: Sequence[Turn], n_images: int) -> str:
        messages = []
        for number, (question, answer) in enumerate(turns):
            shown = 0 if number else n_images
            messages.append({"role": "user", "content": self._content(question, shown)})
            messages.append({"role": "assistant", "content": self._content(answer, 0)})
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, chat_template=self.source, tokenize=False, enable_thinking=False
                )
            )
        except Exception as error:  # a template may raise anything
            raise FastLNError(f"the chat template cannot write a conversation: {error}") from error

    def _content(self, text: str, n_images: int) -> str | list[dict[str, Any]]:
        if self._in_parts:
            return [{"type": "image"}] * n_images + [{"type": "text", "text": text}]
        place = self._placeholder.format(image=self._image_token)
        return f"{place}\n" * n_images + text

    def _takes_parts(self, image_token: str) -> bool:
        """Whether the template takes images and text as parts, as a processor's does; a tokenizer's takes text."""
        turn = (f"{_OPEN}0{_CLOSE}", f"{_OPEN}1{_CLOSE}")
        self._in_parts = True
        try:
            text = self._render([turn], 1)
        except FastLNError:
            return False
        return text.count(image_token) == 1 and all(text.count(part) == 1 for part in turn) and "'type'" not in text

    def _end(self) -> str:
        after = _MARK.split(self._render([("?", f"{_OPEN}0{_CLOSE}")], 0))[-1].lstrip()
        special = [str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        found = [token for token in special if after.startswith(token)]
        if end := max(found, key=len, default=self._tokenizer.eos_token):
            return end
        raise FastLNError("neither the chat template nor the tokenizer has a token to end an answer with")

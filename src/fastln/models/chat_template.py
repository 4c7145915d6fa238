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
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""For models without a chat template: LLaVA's form, `USER: question ASSISTANT: answer</s>`; a system turn first."""

_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters: no text has them, and templates pass them through
_MARK = re.compile(f"{_OPEN}[0-9]+{_CLOSE}")
_SYSTEM = f"{_OPEN}system{_CLOSE}"

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
        forbidden: the tokens that no text of a conversation may hold: that one, and an image's.

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
        self.forbidden = (self.end,) if image_token is None else (self.end, image_token)

    def write(
        self,
        turns: Sequence[Turn],
        image_lengths: Sequence[int] = (),
        *,
        places: Sequence[int] = (),
        system: str = "",
    ) -> Conversation:
        """Write a conversation.

        Args:
            turns: the questions with their answers.
            image_lengths: how many tokens each image takes; images stand before the question of their turn.
            places: the turn of each image, from 0; the first for all by default.
            system: what a system turn says before the conversation; nothing if empty.

        Raises:
            FastLNError: the template changes answers or the system turn instead of only placing them, has no place for
                a system turn, or the conversation contains the model's own image token.
        """
        answers = [answer for _, answer in turns]
        n_images = len(image_lengths)
        images = [(places or [0] * n_images).count(number) for number in range(len(turns))]
        marked = self._render(
            [(question, f"{_OPEN}{number}{_CLOSE}") for number, (question, _) in enumerate(turns)],
            images,
            _SYSTEM if system else "",
        )
        if marked.count(_SYSTEM) != bool(system):
            raise FastLNError("the chat template has no place for a system turn")
        pieces = _MARK.split(marked.replace(_SYSTEM, system))
        whole = "".join(piece + answer for piece, answer in zip(pieces, [*answers, ""], strict=False))
        if len(pieces) != len(turns) + 1 or whole != self._render(turns, images, system):
            raise FastLNError("the chat template changes answers, so fastln cannot find them in the text")
        if self._image_token is not None and (
            whole.count(self._image_token) != n_images or any(self._image_token in answer for answer in answers)
        ):
            raise FastLNError(
                f"the conversation has {whole.count(self._image_token)} times {self._image_token} and {n_images} images"
            )
        pieces = self._expanded(pieces, image_lengths)
        text, spans = pieces[0], []
        for answer, after in zip(answers, pieces[1:], strict=True):
            start = len(text.rstrip(" "))
            blanks = len(after) - len(after.lstrip())
            closed = blanks + len(self.end) if after.startswith(self.end, blanks) else 0
            text += answer + (after[:closed] or self.end)
            spans.append((start, len(text)))
            text += after[closed:]
        return Conversation(text[: spans[-1][1]], tuple(spans))

    def _expanded(self, pieces: Sequence[str], image_lengths: Sequence[int]) -> list[str]:
        """Return the pieces of a conversation, with as many image tokens as each image takes."""
        if self._image_token is None:
            return list(pieces)
        lengths = iter(image_lengths)
        expanded = []
        for piece in pieces:
            before, *between = piece.split(self._image_token)
            expanded.append(before + "".join(self._image_token * next(lengths) + rest for rest in between))
        return expanded

    def _render(self, turns: Sequence[Turn], images: Sequence[int], system: str = "") -> str:
        messages = [{"role": "system", "content": self._content(system, 0)}] if system else []
        for (question, answer), n_images in zip(turns, images, strict=True):
            messages.append({"role": "user", "content": self._content(question, n_images)})
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
            text = self._render([turn], [1])
        except FastLNError:
            return False
        return text.count(image_token) == 1 and all(text.count(part) == 1 for part in turn) and "'type'" not in text

    def _end(self) -> str:
        after = _MARK.split(self._render([("?", f"{_OPEN}0{_CLOSE}")], [0]))[-1].lstrip()
        special = [str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        found = [token for token in special if after.startswith(token)]
        if end := max(found, key=len, default=self._tokenizer.eos_token):
            return end
        raise FastLNError("neither the chat template nor the tokenizer has a token to end an answer with")

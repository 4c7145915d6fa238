"""The task of models that chat (language models with or without a vision tower): questions, reports, conversations."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from fastln.data import demands
from fastln.errors import FastLNError, listing, loading
from fastln.models import llava_med
from fastln.models.chat_template import ChatTemplate, Conversation
from fastln.models.chat_vision import CHAT_VISION, ChatVision
from fastln.models.images import ImageInputs, ImagePixels
from fastln.models.sources import bare_configuration, check_source, load_tokenizer, refuse_missing
from fastln.models.task import NOTHING_KEPT, Kept, VQATask, cast_as_loaded
from fastln.models.tokens import chat_tokenizer
from fastln.ops.linear_cross_entropy import IGNORE_INDEX

if TYPE_CHECKING:
    from fastln.data import Sample, VQADataset

REPORT_QUESTION = "Write the radiology report."
"""The prompt if the data has reports and no questions."""
ANSWER_TOKENS = 64
"""The most tokens generated for a question."""
LONG_ANSWER_TOKENS = 512
"""The most tokens generated if the data has reports or conversations."""

# Encoders also have a class for causal language modelling, for use inside other models.
_LANGUAGE_MODELS = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
MODEL_TYPES = frozenset({*CHAT_VISION, *_LANGUAGE_MODELS})
"""The values that a configuration's model_type may have."""

_BY_TOKEN = {"input_ids", "attention_mask", "mm_token_type_ids"}
_TEXT = {"questions without an image", "reports", "conversations", "system turns"}
_BYTES_BESIDE = 512  # of a template around a text; more than most have


class ChatTask(VQATask):
    """A task that learns every answer of a conversation, and generates the last one.

    Args:
        model: the network.
        tokenizer: a fast tokenizer. If it has no chat template, it gets `fastln.models.chat_template.PLAIN`.
        images: reads images; None for a language model.
        name: the model's name in tables.
        vision: how the model's family reads images; None for a language model.

    Raises:
        FastLNError: if the tokenizer is slow, or its chat template cannot be used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        images: ImageInputs | None,
        *,
        name: str,
        vision: ChatVision | None,
    ) -> None:
        super().__init__(model, tokenizer, images, name=name)
        if not tokenizer.is_fast:
            raise FastLNError(f"{name}: its tokenizer cannot say where tokens are in a text; it needs tokenizer.json")
        self.chat_vision = vision
        self.takes = frozenset(_TEXT if vision is None else {*_TEXT, "images", "several images"})
        self.does = "it reads only text" if vision is None else "it chats about images"
        self.template = ChatTemplate(
            tokenizer,
            tokenizer.get_chat_template() if tokenizer.chat_template else None,
            None if vision is None else tokenizer.convert_ids_to_tokens(model.config.image_token_id),
            "" if vision is None else vision.placeholder,
        )
        tokenizer.chat_template = self.template.source
        first = tokenizer("")["input_ids"][:1]
        self._first = first if first == [tokenizer.bos_token_id] else []
        self.max_tokens = _max_tokens(model, tokenizer)
        self.max_new_tokens = ANSWER_TOKENS
        self._image_lengths: dict[torch.Size, int] = {}

    def set_image_size(self, image_size: int) -> None:
        """Set the size that images are resized to; for Qwen2.5-VL, to at most `image_size`² pixels.

        Raises:
            FastLNError: if the model reads only images of its own size, or none.
        """
        if self.chat_vision is None or self.images is None:
            raise FastLNError(f"image size {image_size}: {self.name} reads only text; leave the image size out")
        self.chat_vision.set_size(self.images, self.model.config, image_size)

    def check_data(self, dataset: VQADataset) -> None:
        """Check that the model can use everything in the samples, and find out how long answers may get.

        Raises:
            FastLNError: as for every task, and if samples are longer than the model's context; the message lists them.
                Nothing is cut off.
        """
        super().check_data(dataset)
        if demands(dataset.samples) & {"reports", "conversations"}:
            self.max_new_tokens = LONG_ANSWER_TOKENS
        problems = []
        tried: set[tuple[bool, bool, bool]] = set()
        for sample in dataset.samples:
            kind = (bool(sample.system), bool(sample.places), bool(sample.images))
            try:
                lengths = self._image_tokens(sample, dataset)
                # Most are short enough by their bytes, since a token has at least one. `collate` checks all again. One
                # of each kind is tried, because some templates have no place for some kinds.
                texts = [sample.system, *(text for turn in _turns(sample) for text in turn)]
                most = sum(len(text.encode()) + _BYTES_BESIDE for text in texts)
                suspect = any(token in text for text in texts for token in self.template.forbidden)
                if suspect or sum(lengths) + most > self.max_tokens or kind not in tried:
                    tried.add(kind)
                    self.encode(sample, lengths)
            except FastLNError as error:
                problems.append(str(error))
        if problems:
            of_one_size = self.images is None or isinstance(self.images, ImagePixels)
            smaller = "" if of_one_size else ", or have images made smaller (--image-size)"
            raise FastLNError(
                f"{dataset.name} {dataset.split}: {len(problems)} of {len(dataset)} samples cannot be used; leave them "
                f"out, or shorten them{smaller}:\n  {listing(problems)}"
            )

    def collate(self, samples: list[Sample], dataset: VQADataset) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and labels (batch, longest), and the model's arguments for all images."""
        keys = [key for sample in samples for key in sample.images]
        images = self.images.inputs(dataset, keys) if self.images else []
        lengths = iter([self._n_tokens(one["pixel_values"].shape) for one in images])
        rows = [self.encode(sample, list(islice(lengths, len(sample.images)))) for sample in samples]
        ids, labels = [row[0] for row in rows], [row[1] for row in rows]
        padded = nn.utils.rnn.pad_sequence
        batch = {
            "input_ids": padded(ids, batch_first=True, padding_value=self._pad_id),
            "attention_mask": padded([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": padded(labels, batch_first=True, padding_value=IGNORE_INDEX),
        }
        if self.chat_vision is not None and self.chat_vision.marks_tokens:
            batch["mm_token_type_ids"] = (batch["input_ids"] == self.model.config.image_token_id).long()
        for name in images[0] if images else ():
            batch[name] = torch.cat([one[name] for one in images])
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def encode(self, sample: Sample, image_lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Return a sample's tokens and labels, (n_tokens,): labels are the answers' tokens, with their end tokens.

        The whole conversation is tokenized at once. The positions of tokens in the text show which belong to answers.

        Args:
            sample: the conversation.
            image_lengths: how many tokens each of its images takes.

        Raises:
            FastLNError: if it is longer than the model's context, or its answers cannot be told from the rest.
        """
        try:
            conversation = self.template.write(
                _turns(sample), image_lengths, places=sample.places, system=sample.system
            )
        except FastLNError as error:
            raise FastLNError(f"sample {sample.id}: {error}") from None
        tokens = self.tokenizer(conversation.text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = tokens["input_ids"], tokens["offset_mapping"]
        if ids[:1] != self._first:
            ids, places = [*self._first, *ids], [*((0, 0) for _ in self._first), *places]
        if len(ids) > self.max_tokens:
            images = f" ({sum(image_lengths)} for its images)" if image_lengths else ""
            raise FastLNError(
                f"sample {sample.id} takes {len(ids)} tokens{images}, and {self.name} reads {self.max_tokens}: "
                "no answer is cut off"
            )
        labels = _labels(ids, places, conversation)
        if labels.count(self._end_id) != len(conversation.answers):
            raise FastLNError(f"sample {sample.id}: an answer contains {self.template.end}, the token that ends it")
        return torch.tensor(ids), torch.tensor(labels)

    def answers(self, batch: dict[str, Tensor]) -> list[str]:
        """Return the greedily generated last answer of each conversation; the model reads the other answers."""
        prompts, n_tokens = self._prompts(batch)
        tokens = self.model.generate(**prompts, generation_config=self._greedy(n_tokens))
        return [text.strip() for text in self.tokenizer.batch_decode(tokens[:, n_tokens:], skip_special_tokens=True)]

    def save_tools(self, directory: Path) -> None:
        """Write what `load_task(directory)` and transformers' `AutoProcessor` need beside the model."""
        super().save_tools(directory)
        if self.images is not None and self.chat_vision is not None and self.chat_vision.processor is not None:
            processor = self.chat_vision.processor(self.model.config, self.images, self.tokenizer)
            processor.save_pretrained(directory)

    def _prompts(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """Return the batch without labels and last answers, padded on the left, and the length of the prompts."""
        labelled = batch["labels"] != IGNORE_INDEX
        begins = labelled & ~labelled.roll(1, dims=1)
        ends = (begins * torch.arange(labelled.shape[1], device=labelled.device)).amax(dim=1).tolist()
        longest = max(ends)
        prompts = {name: tensor for name, tensor in batch.items() if name != "labels"}
        for name in _BY_TOKEN & prompts.keys():
            filling = self._pad_id if name == "input_ids" else 0
            rows = zip(prompts[name], ends, strict=True)
            cut = [nn.functional.pad(row[:end], (longest - end, 0), value=filling) for row, end in rows]
            prompts[name] = torch.stack(cut)
        return prompts, longest

    def _greedy(self, n_tokens: int) -> GenerationConfig:
        # These override all settings of the model that could change greedy search.
        return GenerationConfig(
            max_new_tokens=max(1, min(self.max_new_tokens, self.max_tokens - n_tokens)),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=self._pad_id,
            eos_token_id=sorted({self._end_id, self.tokenizer.eos_token_id} - {None}),
        )

    def _image_tokens(self, sample: Sample, dataset: VQADataset) -> list[int]:
        """Return how many tokens each image of a sample takes, without decoding it."""
        if self.images is None:
            return []
        lengths = []
        for key in sample.images:
            try:
                lengths.append(self._n_tokens(self.images.shape(dataset.stat(key))))
            except FastLNError as error:
                raise FastLNError(f"sample {sample.id}: image {key}: {error}") from None
        return lengths

    def _n_tokens(self, shape: torch.Size) -> int:
        assert self.chat_vision is not None
        if shape not in self._image_lengths:
            self._image_lengths[shape] = self.chat_vision.n_tokens(self.model.config, shape)
        return self._image_lengths[shape]

    @property
    def _end_id(self) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(self.template.end))

    @property
    def _pad_id(self) -> int:
        return self._end_id if self.tokenizer.pad_token_id is None else int(self.tokenizer.pad_token_id)


def from_source(
    source: str, train_data: VQADataset | None, dtype: torch.dtype, seed: int, kept: Kept = NOTHING_KEPT
) -> ChatTask:
    """Load a conversational model.

    Args:
        source: a directory, a hub name, a directory with config.json and no weights, or a configuration's .json file.
        train_data: gives the tokenizer if `source` is a bare configuration.
        dtype: dtype of the parameters.
        seed: seed for the initial weights of a bare configuration.
        kept: what takes the data's place.

    Raises:
        FastLNError: if there is nothing to load, or the model cannot chat.
    """
    name = f"chat:{Path(source).stem if source.endswith('.json') else Path(source).name}"
    if bare := bare_configuration(source):
        with loading(source):
            vision = _chat_vision(str(bare))
            config = AutoConfig.from_pretrained(bare)
            return from_config(config, vision, train_data, dtype, seed, name, kept)
    check_source(source)
    with loading(source):
        if llava_med.is_llava_med(source):
            return ChatTask(*llava_med.load(source, dtype), name=name, vision=CHAT_VISION["llava"])
        vision = _chat_vision(source)
        config = AutoConfig.from_pretrained(source)
        loader = AutoModelForCausalLM if vision is None else AutoModelForImageTextToText
        model, report = loader.from_pretrained(source, dtype=dtype, output_loading_info=True)
        tokenizer = load_tokenizer(source)
        images = None if vision is None else vision.images(source, config, dtype)
    refuse_missing(source, type(model).__name__, report["missing_keys"])
    return ChatTask(model, tokenizer, images, name=name, vision=vision)


def from_config(
    config: PreTrainedConfig,
    vision: ChatVision | None,
    train_data: VQADataset | None,
    dtype: torch.dtype,
    seed: int,
    name: str,
    kept: Kept = NOTHING_KEPT,
) -> ChatTask:
    """Build a conversational model with random weights and a tokenizer of the training data's words."""
    text = config.get_text_config()
    roles = ("bos_token", "eos_token", "pad_token")
    samples = [] if train_data is None else train_data.samples
    tokenizer = kept.tokenizer or chat_tokenizer(
        [
            "USER: ASSISTANT:",
            REPORT_QUESTION,
            *(part for sample in samples for turn in _turns(sample) for part in turn),
            *(sample.system for sample in samples),
        ],
        text.vocab_size,
        {role: _first_of(getattr(text, f"{role}_id", None)) for role in roles},
        further={} if vision is None else {token: getattr(config, field) for field, token in vision.tokens.items()},
    )
    torch.manual_seed(seed)
    config.random_weights = True
    loader = AutoModelForCausalLM if vision is None else AutoModelForImageTextToText
    model = cast_as_loaded(loader.from_config(config), dtype)
    images = None if vision is None else vision.images(None, config, dtype)
    return ChatTask(model, tokenizer, images, name=name, vision=vision)


def _chat_vision(source: str) -> ChatVision | None:
    model_type = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if model_type not in MODEL_TYPES:
        raise FastLNError(
            f"{source}: model_type is {model_type!r}; models that chat are {', '.join(CHAT_VISION)} and transformers' "
            "causal language models (AutoModelForCausalLM), and LLaVA-Med's own checkpoints, with their weights"
        )
    return CHAT_VISION.get(model_type)


def _turns(sample: Sample) -> list[tuple[str, str]]:
    return [*sample.history, (sample.question or REPORT_QUESTION, sample.answer)]


def _labels(ids: list[int], places: list[tuple[int, int]], conversation: Conversation) -> list[int]:
    """Return the tokens that overlap an answer, and `IGNORE_INDEX` in place of all others."""

    def is_answer(start: int, end: int) -> bool:
        return start < end and any(start < after and first < end for first, after in conversation.answers)

    return [token if is_answer(*place) else IGNORE_INDEX for token, place in zip(ids, places, strict=True)]


def _max_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    text = model.config.get_text_config()
    return min(tokenizer.model_max_length, getattr(text, "max_position_embeddings", None) or tokenizer.model_max_length)


def _first_of(ids: int | list[int] | None) -> int | None:
    return ids[0] if isinstance(ids, list) else ids

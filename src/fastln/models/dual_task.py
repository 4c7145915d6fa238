"""The task of the dual encoder, from two pretrained towers, a saved model, or the embedded configuration."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, PreTrainedModel, ViTConfig

from fastln.data.answers import UNKNOWN, AnswerVocabulary
from fastln.errors import FastLNError, loading
from fastln.models.dual_encoder import DualEncoder, DualEncoderConfig
from fastln.models.image_size import check_reads, position_arguments
from fastln.models.images import ImagePixels
from fastln.models.sources import check_source, refuse_missing
from fastln.models.task import NOTHING_KEPT, Kept, VQATask, cast_as_loaded
from fastln.models.tokens import word_tokenizer

if TYPE_CHECKING:
    from fastln.data import Sample, VQADataset

logger = logging.getLogger(__name__)

HEAD = ("fusion_head",)  # a name that no encoder has


class DualEncoderTask(VQATask):
    """A task that classifies the answer of each question; questions on the same image share its vision pass."""

    model: DualEncoder
    images: ImagePixels
    head = HEAD
    vision = "vision"
    shares_images = True

    def collate(self, samples: list[Sample], dataset: VQADataset) -> dict[str, Any]:
        """Return pixel_values (n_images, ...), image_index, input_ids, attention_mask and labels (batch,).

        If images differ in size from the vision encoder's own, the arguments of `positions` are added.
        """
        rows = {key: row for row, key in enumerate(dict.fromkeys(sample.image for sample in samples))}
        vocabulary = self.vocabulary
        return {
            "pixel_values": self.images(dataset, [*rows]).to(self.device),
            "image_index": torch.tensor([rows[sample.image] for sample in samples], device=self.device),
            **self.tokenize([sample.question for sample in samples]),
            "labels": torch.tensor([vocabulary.index(sample.answer) for sample in samples], device=self.device),
            **self.positions,
        }

    @property
    def positions(self) -> dict[str, bool]:
        """The arguments that make the vision encoder interpolate its positions."""
        return position_arguments(self.model.vision, self.images.image_size)

    def check_data(self, dataset: VQADataset) -> None:
        """Check as for every task, and warn if the model cannot give a single one of the answers."""
        super().check_data(dataset)
        vocabulary = self.vocabulary
        if all(vocabulary.index(sample.answer) == UNKNOWN for sample in dataset.samples):
            logger.warning(
                "%s %s: not one answer is among the %d that the model chooses from, so all of its answers are wrong",
                dataset.name,
                dataset.split,
                len(vocabulary),
            )

    def cut_off(self, samples: list[Sample]) -> dict[str, tuple[list[int], int]]:
        """Return the lengths of questions, and how many tokens of each are read."""
        return {"questions": self.question_lengths(samples)}

    def answers(self, batch: dict[str, Any]) -> list[str]:
        """Return the most likely answer of each question."""
        with torch.no_grad():
            logits = self.model(**batch).logits
        return [self.vocabulary[index] for index in logits.argmax(dim=-1).tolist()]

    @property
    def vocabulary(self) -> AnswerVocabulary:
        """The answers that the model chooses from."""
        return AnswerVocabulary(self.model.config.answers)


def embedded(
    train_data: VQADataset | None, dtype: torch.dtype, seed: int, image_size: int | None, kept: Kept = NOTHING_KEPT
) -> DualEncoderTask:
    """Build a small dual encoder (ViT and BERT, width 384) with random weights."""
    questions = [] if train_data is None else [sample.question for sample in train_data.samples]
    tokenizer = kept.tokenizer or word_tokenizer(questions, 1024)
    vision = ViTConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=128,
        patch_size=16,
    )
    text = BertConfig(
        vocab_size=1024,
        hidden_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=1536,
        max_position_embeddings=64,
    )
    config = DualEncoderConfig(
        vision_config=vision,
        text_config=text,
        answers=_answers(train_data, kept.answers),
        random_weights=True,
    )
    torch.manual_seed(seed)
    model = cast_as_loaded(DualEncoder(config), dtype)
    return DualEncoderTask(
        model,
        tokenizer,
        _images(None, model.vision, dtype, image_size),
        name="dual",
        random_head=HEAD,
    )


def from_towers(
    vision: str,
    text: str,
    train_data: VQADataset | None,
    dtype: torch.dtype,
    seed: int,
    image_size: int | None,
    kept: Kept = NOTHING_KEPT,
) -> DualEncoderTask:
    """Join two pretrained encoders under a randomly initialised head.

    Args:
        vision: directory or hub name of the vision encoder (or of a model that has one, such as CLIP).
        text: directory or hub name of the text encoder.
        train_data: its answers are the answer vocabulary, unless others are kept.
        dtype: dtype of the parameters.
        seed: seed for the head's initial weights.
        image_size: edge length of images; by default that of the vision encoder's preprocessing.
        kept: what takes the data's place.

    Raises:
        FastLNError: if there are neither answers nor data, a directory holds no model, a hub name cannot be loaded, or
            the vision encoder does not take such images.
    """
    vision_model, vision_pooler = _tower(vision, "vision_config", dtype)
    text_model, _ = _tower(text, "text_config", dtype)
    with loading(text):
        tokenizer = AutoTokenizer.from_pretrained(text)
    # Copies, because a model under construction clears the attention implementation of its sub-configurations.
    config = DualEncoderConfig(
        vision_config=copy.deepcopy(vision_model.config),
        text_config=copy.deepcopy(text_model.config),
        answers=_answers(train_data, kept.answers),
        vision_pooler=vision_pooler,
    )
    torch.manual_seed(seed)
    model = cast_as_loaded(DualEncoder(config, vision_model, text_model), dtype)
    names = [source.rstrip("/").rsplit("/", 1)[-1] for source in (vision, text)]
    return DualEncoderTask(
        model,
        tokenizer,
        _images(vision, vision_model, dtype, image_size),
        name=f"dual:{names[0]},{names[1]}",
        random_head=HEAD,
    )


def from_saved(
    directory: str, train_data: VQADataset | None, dtype: torch.dtype, image_size: int | None
) -> DualEncoderTask:
    """Load a dual encoder that `VQATask.save` wrote; its head is already trained.

    Raises:
        FastLNError: if something is missing, or the model's vocabulary has none of the data's answers.
    """
    with loading(directory):
        model, report = DualEncoder.from_pretrained(directory, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    refuse_missing(directory, "dual encoder", report["missing_keys"])
    images = _images(directory, model.vision, dtype, image_size)
    task = DualEncoderTask(model, tokenizer, images, name=directory)
    if train_data is not None and all(task.vocabulary.index(s.answer) == UNKNOWN for s in train_data.samples):
        raise FastLNError(
            f"{directory}: not one answer of {train_data.name} is among the {len(task.vocabulary)} that this model "
            "chooses from"
        )
    return task


def _images(source: str | None, encoder: PreTrainedModel, dtype: torch.dtype, image_size: int | None) -> ImagePixels:
    images = ImagePixels.of_source(source, encoder.config, dtype, image_size)
    if image_size is not None:
        check_reads(encoder, image_size)
    return images


def _answers(train_data: VQADataset | None, answers: Sequence[str] | None) -> list[str]:
    if answers is not None:
        return list(answers)
    if train_data is None:
        raise FastLNError("a dual encoder needs the list of answers that it chooses from, or the data that has them")
    return list(AnswerVocabulary.build(sample.answer for sample in train_data.samples))


def _tower(source: str, part: str, dtype: torch.dtype) -> tuple[PreTrainedModel, bool]:
    """Return an encoder, and whether its pooler (if it has one) is pretrained."""
    check_source(source)
    with loading(source):
        config = AutoConfig.from_pretrained(source)
        config = getattr(config, part, config)
        tower, report = AutoModel.from_pretrained(source, config=config, dtype=dtype, output_loading_info=True)
    missing = {name for name in report["missing_keys"] if not name.startswith("pooler.")}
    refuse_missing(source, f"{part.split('_')[0]} encoder", missing)
    return tower, len(missing) == len(report["missing_keys"])

"""The task of BLIP-VQA, which generates its answers; loaded from a directory, a hub name or a bare configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer, BlipConfig, BlipForQuestionAnswering

from fastln.errors import FastLNError, loading
from fastln.models.image_size import INTERPOLATE, position_arguments
from fastln.models.images import ImagePixels
from fastln.models.sources import bare_configuration, check_source, refuse_missing
from fastln.models.task import NOTHING_KEPT, Kept, VQATask, cast_as_loaded
from fastln.models.tokens import word_tokenizer
from fastln.ops.linear_cross_entropy import IGNORE_INDEX

if TYPE_CHECKING:
    from fastln.data import Sample, VQADataset

MAX_ANSWER_TOKENS = 16
_ENDS = 2  # the start token and the end token of a text
_READ = {"pixel_values", "input_ids", "attention_mask", INTERPOLATE}  # before an answer is written


class BlipTask(VQATask):
    """Generates the answer of each question."""

    model: BlipForQuestionAnswering
    images: ImagePixels
    head = ("text_decoder.cls",)
    vision = "vision_model"

    def collate(self, samples: list[Sample], dataset: VQADataset) -> dict[str, Any]:
        """Return pixel_values (batch, ...), question tokens, decoder tokens and labels (batch, n_answer_tokens).

        If images differ in size from the model's own, an argument asks for interpolated positions.
        """
        pixels = self.images(dataset, [sample.image for sample in samples])
        config = self.model.config.text_config
        # The decoder reads its start token, the answer, the end token and padding; the labels are shifted by one token.
        answers = self.tokenizer([sample.answer for sample in samples], add_special_tokens=False)["input_ids"]
        rows = [[config.bos_token_id, *tokens[: MAX_ANSWER_TOKENS - _ENDS], config.sep_token_id] for tokens in answers]
        longest = max(map(len, rows))
        decoder = torch.tensor([row + [config.pad_token_id] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        batch = {
            "pixel_values": pixels,
            "decoder_input_ids": decoder,
            "decoder_attention_mask": mask,
            "labels": decoder.masked_fill(mask == 0, IGNORE_INDEX),
        }
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        positions = position_arguments(self.model.vision_model, self.images.image_size)
        return batch | self.tokenize([sample.question for sample in samples]) | positions

    def cut_off(self, samples: list[Sample]) -> dict[str, tuple[list[int], int]]:
        """Return the lengths of questions and answers, and how many tokens of each are read and learnt."""
        ids = self.tokenizer([s.answer for s in samples], add_special_tokens=False, verbose=False)["input_ids"]
        answers = [len(row) for row in ids], MAX_ANSWER_TOKENS - _ENDS
        return {"questions": self.question_lengths(samples), "answers": answers}

    def answers(self, batch: dict[str, Any]) -> list[str]:
        """Return the greedily generated answer of each question."""
        tokens = self.model.generate(
            **{name: batch[name] for name in _READ & batch.keys()},
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            num_beams=1,
        )
        # The first token is the start token, which the tokenizer does not know.
        return self.tokenizer.batch_decode(tokens[:, 1:], skip_special_tokens=True)


def embedded_config() -> BlipConfig:
    """Return the configuration of the embedded small BLIP: width 384, 6 vision, 4 encoder and 4 decoder layers."""
    return BlipConfig(
        vision_config={
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "image_size": 128,
            "patch_size": 16,
            "initializer_range": 0.02,
        },
        text_config={
            "vocab_size": 1024,
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "max_position_embeddings": 64,
            "bos_token_id": 1022,
            "sep_token_id": 102,
            "eos_token_id": 102,
        },
    )


def from_config(
    config: BlipConfig,
    train_data: VQADataset | None,
    dtype: torch.dtype,
    seed: int,
    image_size: int | None,
    name: str,
    kept: Kept = NOTHING_KEPT,
) -> BlipTask:
    """Build BLIP-VQA with random weights and a tokenizer of the training data's words."""
    text = config.text_config
    samples = [] if train_data is None else train_data.samples
    texts = [text for sample in samples for text in (sample.question, sample.answer)]
    tokenizer = kept.tokenizer or word_tokenizer(
        texts, text.vocab_size, pad_id=text.pad_token_id, sep_id=text.sep_token_id, taken=(text.bos_token_id,)
    )
    torch.manual_seed(seed)
    config.random_weights = True
    model = cast_as_loaded(BlipForQuestionAnswering(config), dtype)
    images = ImagePixels.of_source(None, config.vision_config, dtype, image_size)
    return BlipTask(model, tokenizer, images, name=name)


def from_source(
    source: str,
    train_data: VQADataset | None,
    dtype: torch.dtype,
    seed: int,
    image_size: int | None,
    kept: Kept = NOTHING_KEPT,
) -> BlipTask:
    """Load BLIP-VQA.

    Args:
        source: a directory, a hub name, a directory with config.json and no weights, or a configuration's .json file.
        train_data: gives the tokenizer if `source` is a bare configuration.
        dtype: dtype of the parameters.
        seed: seed for the initial weights of a bare configuration.
        image_size: edge length of images; by default that of the model's preprocessing.
        kept: what takes the data's place.

    Raises:
        FastLNError: if there is nothing to load, it is not BLIP, or its patches do not fit images of this size.
    """
    path = Path(source)
    if bare := bare_configuration(source):
        with loading(source):
            config = BlipConfig.from_json_file(bare)
            if config.model_type != "blip":
                raise FastLNError(f"{bare}: model_type is {config.model_type!r}, not 'blip'")
            return from_config(config, train_data, dtype, seed, image_size, name=f"blip:{path.stem}", kept=kept)
    check_source(source)
    with loading(source):
        model, report = BlipForQuestionAnswering.from_pretrained(source, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    refuse_missing(source, "BLIP-VQA", report["missing_keys"])
    images = ImagePixels.of_source(source, model.config.vision_config, dtype, image_size)
    return BlipTask(model, tokenizer, images, name=f"blip:{path.name}")

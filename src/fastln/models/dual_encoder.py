"""The dual encoder: any transformers vision encoder and text encoder, with a small fusion head over both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from fastln.data.answers import UNKNOWN, AnswerVocabulary
from fastln.errors import FastLNError
from fastln.models.image_size import INTERPOLATE

MODEL_TYPE = "fastln-dual-encoder"
PASS_TOKENS = 128
"""The cost of one more pass of the text encoder, in tokens: it takes some milliseconds of Python."""


class DualEncoderConfig(PreTrainedConfig):
    """Configuration of `DualEncoder`.

    Attributes:
        vision_config: the vision encoder's configuration.
        text_config: the text encoder's configuration.
        answers: the answer vocabulary; the model classifies over it.
        head_hidden_size: width of the fusion head.
        head_dropout: dropout probability inside the fusion head.
        vision_pooler: whether the vision encoder's own pooler is pretrained; otherwise it is left out.
        random_weights: whether the encoders have random weights, so that accuracy means nothing.
    """

    model_type = MODEL_TYPE
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012

    vision_config: Any = None
    text_config: Any = None
    answers: Any = None
    head_hidden_size: int = 1024
    head_dropout: float = 0.2
    vision_pooler: bool = True
    random_weights: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _as_config(self.vision_config)
        self.text_config = _as_config(self.text_config)
        super().__post_init__(**kwargs)


def _as_config(value: Any) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    fields = dict(value) if value else {"model_type": "bert"}
    return AutoConfig.for_model(**fields)


class FusionHead(nn.Module):
    """A two-layer perceptron over the features of both towers."""

    def __init__(self, n_features: int, config: DualEncoderConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(n_features, config.head_hidden_size)
        self.classifier = nn.Linear(config.head_hidden_size, len(config.answers))
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(config.head_dropout)

    def forward(self, vision: Tensor, text: Tensor) -> Tensor:
        """Return logits (batch, n_answers) from features (batch, 2 * vision_size) and (batch, text_size)."""
        features = self.dropout(torch.cat([vision, text], dim=-1))
        return self.classifier(self.dropout(self.activation(self.hidden(features))))


class DualEncoder(PreTrainedModel):
    """A vision encoder, a text encoder, and a fusion head that chooses an answer from their pooled features."""

    config: DualEncoderConfig
    config_class = DualEncoderConfig
    base_model_prefix = "dual_encoder"
    accepts_loss_kwargs = False
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: DualEncoderConfig,
        vision: PreTrainedModel | None = None,
        text: PreTrainedModel | None = None,
    ) -> None:
        """Build the model, around the given encoders if any.

        Args:
            config: the whole model's configuration.
            vision: a loaded vision encoder; built from `config.vision_config` by default.
            text: a loaded text encoder; built from `config.text_config` by default.
        """
        super().__init__(config)
        for part in (config.vision_config, config.text_config):
            if not isinstance(getattr(part, "hidden_size", None), int):
                raise FastLNError(
                    f"an encoder of type {part.model_type!r} has no hidden_size: it must give a sequence "
                    "of tokens of one width"
                )
        AnswerVocabulary(config.answers or [])
        self.vision = AutoModel.from_config(config.vision_config) if vision is None else vision
        self.text = AutoModel.from_config(config.text_config) if text is None else text
        # One configuration object per tower, so that settings changed on the whole model reach the tower.
        self.config.vision_config = self.vision.config
        self.config.text_config = self.text.config
        if not config.vision_pooler:
            self.vision.pooler = None
        # A BERT pooler is not needed: features are the mean over tokens.
        if getattr(self.text, "pooler", None) is not None:
            self.text.pooler = None
        self.fusion_head = FusionHead(2 * config.vision_config.hidden_size + config.text_config.hidden_size, config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # The towers initialise (or load) themselves; the head keeps torch's own initialisation.
        if isinstance(module, FusionHead):
            for child in module.children():
                if isinstance(child, nn.Linear):
                    child.reset_parameters()

    def vision_features(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Return (n_images, 2 * hidden) from (n_images, 3, height, width): the pooled output beside the token mean."""
        positions = {INTERPOLATE: True} if interpolate_pos_encoding else {}  # not all encoders take this
        outputs = self.vision(pixel_values=pixel_values, **positions)
        mean = outputs.last_hidden_state.mean(dim=1)
        pooled = getattr(outputs, "pooler_output", None)
        return torch.cat([_standardised(mean if pooled is None else pooled), _standardised(mean)], dim=-1)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return (batch, hidden): the mean of the last hidden states over the tokens that are not padding.

        On a CPU, texts of similar length get a separate pass if that saves more padding than a pass costs.
        """
        if input_ids.device.type != "cpu":
            return self._text_features(input_ids, attention_mask)
        ends = (attention_mask != 0) * torch.arange(1, input_ids.shape[1] + 1)
        lengths, order = ends.amax(dim=1).sort(stable=True)
        parts, start = [], 0
        for stop in passes(lengths.tolist()):
            rows, n_tokens = order[start:stop], max(int(lengths[stop - 1]), 1)
            parts.append(self._text_features(input_ids[rows, :n_tokens], attention_mask[rows, :n_tokens]))
            start = stop
        return torch.cat(parts)[order.argsort()]

    def _text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.text(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        keep = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return _standardised((hidden * keep).sum(dim=1) / keep.sum(dim=1).clamp(min=1))

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_index: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify each question's answer.

        Args:
            pixel_values: (n_images, 3, height, width).
            input_ids: (batch, n_tokens), the questions.
            attention_mask: (batch, n_tokens), 1 for tokens and 0 for padding.
            image_index: (batch,), each question's row in `pixel_values`, so that questions on one image share its
                vision pass; by default there is one image per question.
            labels: (batch,), indices into `config.answers`; `UNKNOWN` for an answer that is not in the vocabulary.
            interpolate_pos_encoding: whether to ask the vision encoder, which must take this, to interpolate its
                positions for images of another size than its own.
            **kwargs: what a trainer adds (for example `num_items_in_batch`); not used.

        Returns:
            `loss` (None without labels) and `logits` (batch, n_answers).
        """
        vision = self.vision_features(pixel_values, interpolate_pos_encoding)
        if image_index is not None:
            vision = vision[image_index]
        logits = self.fusion_head(vision, self.text_features(input_ids, attention_mask))
        loss = None
        if labels is not None:
            loss = answer_loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def passes(lengths: Sequence[int]) -> list[int]:
    """Cut texts into passes so that the total cost of tokens, padding and passes is lowest.

    Args:
        lengths: lengths of the texts, in rising order; a pass is as long as its last text.

    Returns:
        The end of each pass.
    """
    costs, starts = [0], [0]
    for stop in range(1, len(lengths) + 1):
        cost, start = min(
            (costs[start] + (stop - start) * lengths[stop - 1] + PASS_TOKENS, start) for start in range(stop)
        )
        costs.append(cost)
        starts.append(start)
    ends, stop = [], len(lengths)
    while stop:
        ends.append(stop)
        stop = starts[stop]
    return ends[::-1]


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (batch, n_answers) over labels (batch,) that are answers; else 0."""
    total = nn.functional.cross_entropy(logits.float(), labels, ignore_index=UNKNOWN, reduction="sum")
    return total / (labels != UNKNOWN).sum().clamp(min=1)


def _standardised(features: Tensor) -> Tensor:
    # The towers' scales differ by an order of magnitude; without this the larger one dominates.
    return nn.functional.layer_norm(features, features.shape[-1:])


AutoConfig.register(MODEL_TYPE, DualEncoderConfig, exist_ok=True)
AutoModel.register(DualEncoderConfig, DualEncoder, exist_ok=True)

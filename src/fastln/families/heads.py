"""Find the language-model heads of a transformers model: the layers that turn hidden states into logits."""

from __future__ import annotations

from torch import nn

from fastln.families.parts import output_embeddings, pretrained_models


def find_heads(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the language-model heads of `model` by name.

    A head is the result of `get_output_embeddings` of the model, or of a model inside it, if it is a plain
    `torch.nn.Linear`. Other heads (quantised, adapted or sharded ones) are not returned.

    Args:
        model: A `PreTrainedModel`, or a module that contains some.
    """
    heads = {id(head) for _, part in pretrained_models(model) if (head := output_embeddings(part)) is not None}
    return {name: module for name, module in model.named_modules() if id(module) in heads and type(module) is nn.Linear}

"""The language-model heads of a transformers model: the linear layers that turn hidden states into logits."""

from torch import nn
from transformers import PreTrainedModel

from fastln.standins.modules import LMHead, stand_in


def find_heads(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the language-model heads of `model` by name.

    A head is what `get_output_embeddings` of the model, or of a model inside it, returns, where that is a
    `torch.nn.Linear`; others (quantised, adapted, sharded ones) are left alone.

    Args:
        model: A `PreTrainedModel`, or a module that contains some.
    """
    heads = {id(head) for module in model.modules() if isinstance(module, PreTrainedModel) for head in _heads(module)}
    return {name: module for name, module in model.named_modules() if id(module) in heads and type(module) is nn.Linear}


def use_lazy_head(model: nn.Module) -> list[str]:
    """Leave the logits of every language-model head of `model` uncomputed in training, in place.

    Parameters, tied or not, and `state_dict()` stay as they are; `fastln.standins.modules.stand_back` undoes it.

    Args:
        model: A `PreTrainedModel`, or a module that contains some.

    Returns:
        The names of the heads.
    """
    heads = find_heads(model)
    for head in heads.values():
        stand_in(head, LMHead)
    return list(heads)


def _heads(model: PreTrainedModel) -> list[nn.Module]:
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    return [] if head is None else [head]

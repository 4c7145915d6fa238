"""The language-model heads of a transformers model: the linear layers that turn hidden states into logits."""

from torch import nn
from transformers import PreTrainedModel

from fastln.modules import LMHead


def use_lazy_head(model: nn.Module) -> list[str]:
    """Leave the logits of every language-model head of `model` uncomputed in training, in place.

    A head is what `get_output_embeddings` of the model, or of a model inside it, returns, where that is a
    `torch.nn.Linear`; others (quantised, adapted, sharded ones) are left alone. Parameters, tied or not, and
    `state_dict()` stay as they are.

    Args:
        model: A `PreTrainedModel`, or a module that contains some.

    Returns:
        The names of the heads.
    """
    heads = {id(head) for module in model.modules() if isinstance(module, PreTrainedModel) for head in _heads(module)}
    names = []
    for name, module in model.named_modules():
        if id(module) in heads and type(module) is nn.Linear:
            LMHead.from_stock(module)
            names.append(name)
    return names


def restore_head(model: nn.Module) -> None:
    """Give the heads that `use_lazy_head` changed their stock code back, in place.

    Args:
        model: The model that `use_lazy_head` took.
    """
    for module in model.modules():
        if isinstance(module, LMHead):
            LMHead.to_stock(module)


def _heads(model: PreTrainedModel) -> list[nn.Module]:
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    return [] if head is None else [head]

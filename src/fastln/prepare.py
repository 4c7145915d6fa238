"""prepare() and restore(): make a model train its norms fast, and give it back."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from fastln.errors import FastLNError
from fastln.methods import norm_parameters
from fastln.plan import apply, plan, prepared

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


def prepare(
    model: ModelT,
    method: str = "layernorm",
    *,
    scope: str | Iterable[str] | None = None,
    also: str | Iterable[str] = (),
    activations: str = "exact",
    products: str = "exact",
    without: str | Iterable[str] = (),
    backend: str = "auto",
) -> ModelT:
    """Choose what trains, and have fastln compute what stores more than it must, in place.

    `fastln.plan` with the same arguments says beforehand what changes; `fastln doctor` lists the names for `without`.

    Modules stay the objects that they are, with their hooks and attributes, and `state_dict()` keeps its keys and
    shapes. The parameters of trained norms become float32 in models of lower precision: at bfloat16 a step of 1e-4 on
    a weight of 1.0 rounds to nothing. If anything fails, the model is as it was.

    Args:
        model: Any transformers model (any `nn.Module` whose norms are LayerNorms or RMSNorms).
        method: A name from `fastln.methods.METHODS`, or one code for each sub-model, in the model's order, joined by
            dashes: T trained, F frozen, LN its norms, ATT its attention, FFN its feed-forward networks (`LN-F-T`).
        scope: The sub-models to tune (`vision`, `text`, `decoder`, `projector`), all by default; or such codes.
        also: Names of further modules that train whole, such as a task head that starts random.
        activations: What is kept for backward: a name from `fastln.ops.settings.STORAGES`.
        products: In which form matrix products run: a name from `fastln.ops.settings.PRODUCTS`.
        without: Names of changes to leave out: keys of `fastln.standins.tricks.TRICKS`.
        backend: `auto`, `triton`, `cpu` or `reference`, which is plain PyTorch throughout.

    Returns:
        The same model.

    Raises:
        FastLNError: If the model is prepared already, or for an unknown method, scope, backend or other name.
    """
    decided = plan(
        model,
        method,
        scope=scope,
        also=also,
        activations=activations,
        products=products,
        without=without,
        backend=backend,
    )
    for note in decided.notes:
        logger.warning("%s", note)
    apply(decided, model)
    for line in decided.summary():
        logger.info("%s", line)
    return model


def restore(model: ModelT) -> ModelT:
    """Give the modules their stock code back, in place; the tuned values stay, in the model's own dtype.

    In a bfloat16 model that rounds them: a γ of 1.001 becomes 1. To keep every digit, take `state_dict()` first, or
    turn the model to float32 before.

    Args:
        model: A model that went through `prepare`.

    Returns:
        The same model.

    Raises:
        FastLNError: If the model is not prepared, or has got parameters since (a parametrization, an adapter's layers);
            nothing of it has changed then.
    """
    state = prepared(model)
    if state is None:
        raise FastLNError("this model is not prepared; there is nothing to restore")
    new = [name for name, _ in model.named_parameters() if name not in state.requires_grad]
    if new:
        raise FastLNError(
            f"{len(new)} parameters came to the model after fastln.prepare(), for example {new[0]}: take away what "
            "brought them (torch.nn.utils.parametrize.remove_parametrizations, peft's unload()), then restore"
        )
    state.remove(model)
    for parameter in model.parameters():
        parameter.grad = None
    return model


def check_norm_gradients(model: nn.Module) -> None:
    """Check, after a backward pass, that every trained norm received its gradients.

    Raises:
        FastLNError: Naming the norms that did not.
    """
    norms = {name: model.get_parameter(name) for name in norm_parameters(model)}
    silent = [name for name, parameter in norms.items() if parameter.requires_grad and parameter.grad is None]
    if silent:
        raise FastLNError(
            f"{len(silent)} trained norm parameters received no gradient, because the loss does not depend on them: "
            f"{', '.join(silent[:5])}{', ...' if len(silent) > 5 else ''}; leave them out with `scope`"
        )

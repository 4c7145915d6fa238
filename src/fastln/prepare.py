"""prepare() makes a model train its norms fast; restore() undoes it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from fastln.decision import Plan
from fastln.errors import FastLNError
from fastln.plan import apply, plan
from fastln.state import prepared

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


def prepare(
    model: ModelT,
    method: str = "layernorm",
    *,
    scope: str | Iterable[str] | None = None,
    also: str | Iterable[str] = (),
    activations: str = "exact",
    memory_budget: float | str | None = None,
    products: str = "exact",
    without: str | Iterable[str] = (),
    keep_weights: bool = False,
    backend: str = "auto",
    batch: Mapping[str, Any] | None = None,
) -> ModelT:
    """Choose which parameters train, and replace modules by versions that store and compute less, in place.

    Call `fastln.plan` with the same arguments to see the changes beforehand. `fastln doctor` lists the names for
    `without`.

    Modules stay the same objects and keep their hooks and attributes. `state_dict()` keeps its keys and shapes. In a
    model of lower precision the parameters of trained norms become float32, because in bfloat16 a step of 1e-4 on a
    weight of 1.0 is lost to rounding. If anything fails, the model stays unchanged.

    Args:
        model: Any transformers model, or any `nn.Module` with LayerNorm or RMSNorm modules.
        method: A name from `fastln.methods.METHODS`, or one code per sub-model, in the model's order, joined by dashes
            (`LN-F-T`): T trains everything, F nothing, LN the norms, ATT attention, FFN the feed-forward networks.
        scope: The parts to tune: sub-models (`vision`, `text`, `decoder`, `projector`), patterns of module names,
            either of them after `not:` to leave it out, or such codes. By default all sub-models.
        also: Names of further modules that train in full. A head that was not in the checkpoint trains without being
            named, unless `without` has `random_heads`.
        activations: What is kept for backward: a name from `fastln.ops.settings.STORAGES`.
        memory_budget: How much memory a training step may take: bytes, a size such as "8GiB", or a share of the
            device's memory (0.9). Each block then gets the storage mode that costs least time, so that the step fits.
        products: The form in which matrix products run. `exact`: in the model's own dtype. `int8`: frozen linear layers
            hold their weight in 8 bits and multiply in 8 bits, forward and backward. The plan says which, and why
            others do not.
        without: Names of changes to leave out: keys of `fastln.standins.tricks.TRICKS`.
        keep_weights: Whether `products="int8"` keeps the original weights too, so that `restore` can put them back.
        backend: `auto`, `triton`, `cpu`, or `reference` for plain PyTorch throughout.
        batch: For a memory budget: the model's arguments in training, with labels; only shapes and dtypes count.
            Without it, the first batch decides, and a larger one decides again.

    Returns:
        The same model.

    Raises:
        FastLNError: If the model is already prepared, or if the method, the scope, the backend or another name is
            unknown.
    """
    decided = plan(
        model,
        method,
        scope=scope,
        also=also,
        activations=activations,
        memory_budget=memory_budget,
        products=products,
        without=without,
        keep_weights=keep_weights,
        backend=backend,
        batch=batch,
    )
    carry_out(decided, model)
    warn_of_precision(model)
    return model


def carry_out(plan: Plan, model: nn.Module) -> None:
    """Apply a plan, and log it."""
    for note in plan.notes:
        logger.warning("%s", note)
    apply(plan, model)
    for line in plan.summary():
        logger.info("%s", line)


def warn_of_precision(model: nn.Module) -> None:
    """Warn if parameters train in 16 bits, where an optimizer without float32 copies loses steps or gives NaN."""
    narrow = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad and p.dtype.itemsize == 2}
    if not narrow:
        return
    dtypes = sorted({str(dtype).removeprefix("torch.") for dtype in narrow.values()})
    harm = "turns them NaN" if torch.float16 in narrow.values() else "loses small steps"
    logger.warning(
        "%d parameters train in %s, for example %s, and plain AdamW %s: load the model in float32, or use "
        "FastLNTrainer or fastln.training.MasterAdamW, which keep float32 copies",
        len(narrow),
        " and ".join(dtypes),
        next(iter(narrow)),
        harm,
    )


def restore(model: ModelT) -> ModelT:
    """Undo `prepare`, in place. The tuned values stay, cast to the model's own dtype.

    In a bfloat16 model the cast rounds them: a γ of 1.001 becomes 1. To keep full precision, save `state_dict()` before
    you restore, or convert the model to float32 before you prepare it.

    Args:
        model: A prepared model.

    Returns:
        The same model.

    Raises:
        FastLNError: If the model is not prepared, has gained parameters since (from a parametrization or an adapter),
            or holds weights in 8 bits whose originals were not kept. The model stays unchanged then.
    """
    state = prepared(model)
    if state is None:
        raise FastLNError("this model is not prepared; there is nothing to restore")
    new = [name for name, _ in model.named_parameters() if name not in state.requires_grad]
    if new:
        raise FastLNError(
            f"the model gained {len(new)} parameters after fastln.prepare(), for example {new[0]}: remove what added "
            "them (torch.nn.utils.parametrize.remove_parametrizations, peft's unload()), then restore"
        )
    if n_lost := state.n_lost:
        raise FastLNError(
            f"products='int8' replaced {n_lost} weights by their 8-bit form and did not keep them: prepare the model "
            "with keep_weights=True to restore it later; or save_adapter(), load the base again, and load_adapter()"
        )
    state.remove(model)
    for parameter in model.parameters():
        parameter.grad = None
    return model

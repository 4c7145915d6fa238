"""prepare() and restore(): make a model train its norms fast, and give it back."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fastln.errors import FastLNError
from fastln.families import find_norms
from fastln.machine import why_no_arena
from fastln.methods import describe_other_norms, get_method, select_parameters, settle_scope
from fastln.ops.backends import resolve
from fastln.standins.arena import Arena
from fastln.standins.attention import restore_attention, use_fast_attention
from fastln.standins.blocks import use_stand_ins
from fastln.standins.last_block import spare_last_rows
from fastln.standins.linear import use_fast_linears
from fastln.standins.lm_head import use_lazy_head
from fastln.standins.modules import is_stand_in, output_dtype, remember_dtype, stand_back
from fastln.standins.training_steps import spare_training_steps

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)
STATE = "_fastln_state"


@dataclass
class _Prepared:
    """What restore() has to undo, and which modules train whole."""

    also: tuple[str, ...] = ()
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    hooks: list[Any] = field(default_factory=list)
    attention: list[PreTrainedConfig] = field(default_factory=list)
    arena: Arena = field(default_factory=Arena)


def prepare(
    model: ModelT,
    method: str = "layernorm",
    *,
    scope: str | Iterable[str] | None = None,
    also: str | Iterable[str] = (),
    backend: str = "auto",
) -> ModelT:
    """Choose what trains and have fastln compute all that stores more than it owes, in place.

    That is norms, activations, dropouts, post-norm blocks, gated MLPs, attention, the language-model head and, on a
    CPU, linear layers. In training models make no cache of keys and values, unless they are told to, gradient
    checkpointing is done without reentry, and of the last block's tokens those that are read are computed beyond its
    attention.

    Modules stay the objects that they are, with their hooks and attributes, and `state_dict()` keeps its keys and
    shapes. The parameters of trained norms become float32 in models of lower precision: at bfloat16 a step of 1e-4 on
    a weight of 1.0 rounds to nothing.

    Args:
        model: any transformers model (any `nn.Module` whose norms are LayerNorms or RMSNorms).
        method: a name from `fastln.methods.METHODS`, or one code for each sub-model, in the model's order, joined by
            dashes: T trained, F frozen, LN its norms, ATT its attention, FFN its feed-forward networks (`LN-F-T`).
        scope: the sub-models to tune (`vision`, `text`, `decoder`, `projector`), all by default; or such codes.
        also: names of further modules that train whole, such as a task head that starts random.
        backend: `auto`, `triton`, `cpu` or `reference`, of norms and attention.

    Returns:
        The same model.

    Raises:
        FastLNError: if the model is prepared already, or for an unknown method, scope or backend.
    """
    if hasattr(model, STATE):
        raise FastLNError("this model is prepared already; call fastln.restore(model) first")
    inside = next(
        (name for name, module in model.named_modules() if hasattr(module, STATE) or is_stand_in(module)), None
    )
    if inside is not None:
        raise FastLNError(
            f"{inside!r} in this model, or a model around it, is prepared already; restore that first, then prepare "
            "the outermost model, with `scope` for the sub-models to tune"
        )
    method, scope = settle_scope(method, scope)
    chosen, _ = get_method(method)
    also = (also,) if isinstance(also, str) else tuple(also)
    trained = select_parameters(model, chosen, scope, also)
    if not trained:
        raise FastLNError(f"method {method!r} trains nothing by itself; name the task head's modules with `also`")
    if (left_out := describe_other_norms(model, trained, scope)) is not None:
        logger.warning("%s", left_out)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    resolve("layer_norm", device, backend)

    state = _Prepared(also)
    if backend != "reference":  # before a norm, perhaps the parameter whose dtype a model goes by, becomes float32
        state.attention = use_fast_attention(model)
    for name, parameter in model.named_parameters():
        state.requires_grad[name] = parameter.requires_grad
        parameter.requires_grad_(name in trained)
    norms = list(find_norms(model))
    narrow = {}
    for name, norm in norms:
        for own, parameter in norm.named_parameters(recurse=False):
            if parameter.requires_grad:
                state.dtypes[f"{name}.{own}"] = parameter.dtype
                if parameter.dtype.itemsize == 2:
                    narrow[name] = parameter.dtype
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    slow = set(use_stand_ins(model, backend))
    for name, norm in norms:
        if name not in slow and name in narrow:
            remember_dtype(norm, narrow[name])
        if name in slow and any(parameter.requires_grad for parameter in norm.parameters(recurse=False)):
            hook = functools.partial(_in_the_stock_dtype, narrow.get(name))
            state.hooks.append(norm.register_forward_hook(hook))
            logger.info(
                "%s (%s) is tuned with its stock code: fastln has no fast form of it", name, type(norm).__name__
            )
    use_lazy_head(model)
    use_fast_linears(model, backend, device)
    state.hooks += spare_training_steps(model)
    if backend != "reference":
        state.hooks += spare_last_rows(model)
    if why_no_arena(device) is None:
        state.arena.put()
    setattr(model, STATE, state)
    return model


def restore(model: ModelT) -> ModelT:
    """Give the modules their stock code back, in place; the tuned values stay, in the model's own dtype.

    In a bfloat16 model that rounds them: a γ of 1.001 becomes 1. To keep every digit, take `state_dict()` first, or
    turn the model to float32 before.

    Args:
        model: a model that went through `prepare`.

    Returns:
        The same model.

    Raises:
        FastLNError: if the model is not prepared, or has got parameters since (a parametrization, an adapter's layers);
            nothing of it has changed then.
    """
    state: _Prepared | None = getattr(model, STATE, None)
    if state is None:
        raise FastLNError("this model is not prepared; there is nothing to restore")
    new = [name for name, _ in model.named_parameters() if name not in state.requires_grad]
    if new:
        raise FastLNError(
            f"{len(new)} parameters came to the model after fastln.prepare(), for example {new[0]}: take away what "
            "brought them (torch.nn.utils.parametrize.remove_parametrizations, peft's unload()), then restore"
        )
    stand_back(model)
    for hook in state.hooks:
        hook.remove()
    for name, parameter in model.named_parameters():
        if name in state.dtypes:
            parameter.data = parameter.data.to(state.dtypes[name])
        parameter.requires_grad_(state.requires_grad[name])
        parameter.grad = None
    restore_attention(state.attention)
    state.arena.remove()
    delattr(model, STATE)
    return model


def check_norm_gradients(model: nn.Module) -> None:
    """Check, after a backward pass, that every trained norm received its gradients.

    Raises:
        FastLNError: naming the norms that did not.
    """
    silent = [
        f"{name}.{part}"
        for name, norm in find_norms(model)
        for part, parameter in norm.named_parameters(recurse=False)
        if parameter.requires_grad and parameter.grad is None
    ]
    if silent:
        raise FastLNError(
            f"{len(silent)} trained norm parameters received no gradient, for the loss does not depend on them: "
            f"{', '.join(silent[:5])}{', ...' if len(silent) > 5 else ''}; leave them out with `scope`"
        )


def _in_the_stock_dtype(dtype: torch.dtype | None, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    # A float32 weight promotes what stock code returns; the rest of the model expects its own dtype.
    return output.to(output_dtype(args[0], dtype))

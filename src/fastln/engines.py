"""Engines set up a model for a method: fastln itself, plain torch, or peft. All train the same kinds of parameters."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners import lora
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from fastln.adapters import (
    CONFIG,
    LN_TUNING,
    PARTS,
    PEFT_PREFIX,
    WEIGHTS,
    NoAdapterError,
    adapter_contents,
    adapter_type,
    load_adapter,
    name_or_path,
    read_tensors,
)
from fastln.changes import EXTRA, changed_buffers, extra_states, load_extra_states, mark_buffers
from fastln.decision import Plan, describe_random_heads
from fastln.errors import FastLNError, loading
from fastln.families import find_norms, parameters_in
from fastln.families.parts import attention_maps, ffn_maps
from fastln.files import written_whole
from fastln.methods import (
    FROZEN,
    IA3_TARGETS,
    LORA_RANK,
    LORA_TARGETS,
    get_method,
    random_heads,
    select_parameters,
)
from fastln.origin import ORIGIN, Origin, origin_bytes
from fastln.plan import apply, plan
from fastln.prepare import carry_out, restore
from fastln.settings import MethodSettings
from fastln.standins.int8 import Int8Weight, merges_are_refused
from fastln.state import prepared

logger = logging.getLogger(__name__)

N_VIRTUAL_TOKENS = 20
PROMPT_METHODS = ("prefix", "p-tuning", "prompt")
_BESIDE_LORA = {"layernorm+lora": "layernorm", "lora": FROZEN}
"""What trains of the model itself under methods that put LoRA's layers on a prepared model."""
_VIRTUAL = ("PREFIX_TUNING", "P_TUNING", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING")  # peft's names for these
_TASK_TYPES = {
    "CAUSAL_LM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_CLS": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


def put_method(
    model: nn.Module,
    method: str = "layernorm",
    engine: str | None = None,
    *,
    scope: str | Iterable[str] | None = None,
    also: str | Iterable[str] = (),
    without: str | Iterable[str] = (),
    backend: str = "auto",
    activations: str = "exact",
    memory_budget: float | str | None = None,
    products: str = "exact",
    keep_weights: bool = False,
) -> nn.Module:
    """Set up any model for `method`, in place.

    A head that was not in the model's checkpoint trains too, as if `also` named it.

    Args:
        model: the model.
        method: as `fastln.methods.get_method` takes it.
        engine: the engine that runs it; the method's first by default.
        scope: as `fastln.prepare` takes it.
        also: names of further modules that train in full.
        without: names of what `fastln.prepare` leaves out, for engine `fastln`; `random_heads` for every engine.
        backend: the backend of fastln's operations; this and the next four for engine `fastln` only.
        activations: as `fastln.prepare` takes it.
        memory_budget: as `fastln.prepare` takes it; the first batch decides.
        products: as `fastln.prepare` takes it.
        keep_weights: as `fastln.prepare` takes it.

    Returns:
        The module to train: the model itself, or peft's wrapper of it.

    Raises:
        FastLNError: for an unknown method, engine, scope or other name, a model in which the method matches nothing, or
            what only engine `fastln` does with another engine.
    """
    settings = MethodSettings.of(
        method,
        engine,
        scope=scope,
        also=also,
        without=without,
        backend=backend,
        activations=activations,
        memory_budget=memory_budget,
        products=products,
        keep_weights=keep_weights,
    )
    return put(model, settings)


def put(model: nn.Module, settings: MethodSettings, *, quietly: bool = False) -> nn.Module:
    """Set up a model with `settings`, as `put_method` does.

    Args:
        model: the model.
        settings: what `put_method` would be called with.
        quietly: whether to leave the plan out of the log: where its table is shown, or the model only takes values.
    """
    trained = _put(model, settings, apply if quietly else carry_out)
    if isinstance(trained, peft.PeftModel):
        # Not as a module of it: so that who is given the model, into which peft puts layers, finds the wrapper.
        model.__dict__[WRAPPER] = trained
        trained.__dict__[SETTINGS] = settings
    mark_buffers(trained)
    return trained


SETTINGS = "_fastln_settings"
"""The attribute of peft's wrapper that has the `MethodSettings` which it was made for."""
WRAPPER = "_fastln_wrapper"
"""The attribute of a model that has peft's wrapper of it."""


def _put(model: nn.Module, settings: MethodSettings, do: Callable[[Plan, nn.Module], None]) -> nn.Module:
    if settings.engine == "fastln":
        if settings.method in _BESIDE_LORA:
            return _with_lora(model, settings, do)
        do(plan(model, **settings.of_plan), model)
        return model
    chosen, _ = get_method(settings.method)
    by_torch = settings.engine == "torch"
    named = (
        select_parameters(model, chosen, settings.scope, settings.also) if by_torch else _inside(model, settings.also)
    )
    random = random_heads(model, named, settings.without, settings.scope)
    if settings.method in PROMPT_METHODS:
        return _prompted(model, settings, random.train)
    if random.note:
        logger.warning("%s", random.note)
    if random.train:
        logger.info("%s", describe_random_heads(random.train))
    settings = replace(settings, also=(*settings.also, *random.train))
    if by_torch:
        trained = select_parameters(model, chosen, settings.scope, settings.also)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        return model
    config = _peft_config(model, settings)
    config.modules_to_save = list(settings.also) or None
    # The optimizer keeps float32 copies of low-precision parameters for every engine; peft's own would slow it down.
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def _prompted(model: nn.Module, settings: MethodSettings, random: tuple[str, ...]) -> nn.Module:
    if settings.also:
        raise FastLNError(
            f"method {settings.method!r} trains only its virtual tokens; it cannot train {', '.join(settings.also)} too"
        )
    trained = peft.get_peft_model(model, _prompt_config(model, settings), autocast_adapter_dtype=False)
    # For sequence classification, peft trains the head itself.
    frozen = [name for name in random if not isinstance(model.get_submodule(name), ModulesToSaveWrapper)]
    if frozen:
        logger.warning(
            "not in the checkpoint, so random, and frozen: %s; method %r trains only its virtual tokens",
            ", ".join(frozen),
            settings.method,
        )
    return trained


def _inside(model: nn.Module, modules: Iterable[str]) -> set[str]:
    prefixes = tuple(f"{name}." for name in modules)
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def check_finishes(method: str) -> None:
    """Check that `to_stock` can make what `method` trains part of the model itself.

    Raises:
        FastLNError: if it trains virtual tokens.
    """
    if method in PROMPT_METHODS:
        raise FastLNError(
            f"method {method!r} trains virtual tokens, which cannot be saved as part of a model; use FastLNTrainer, "
            "which keeps them in peft's own form"
        )


def can_restore(model: nn.Module) -> bool:
    """Whether a model has the weights that `to_stock` needs: not if 8-bit ones replaced them and they were not kept.

    Args:
        model: a model, or peft's wrapper of it.
    """
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    state = prepared(base)
    return state is None or not state.n_lost


def to_stock(trained: nn.Module) -> nn.Module:
    """Return the stock model with the trained values in it.

    Args:
        trained: what `put_method` returned. The model in it is changed in place.

    Raises:
        FastLNError: if 8-bit weights replaced the model's own. Nothing changes then.
    """
    if not can_restore(trained):
        raise FastLNError(
            "8-bit weights replaced the model's own, so what trained cannot become part of it: save the adapter or a "
            "checkpoint and load that into the base, or set it up with keep_weights=True"
        )
    model = trained
    if isinstance(trained, peft.PeftModel):
        # peft leaves its wrappers around modules in `also` (for norms), or treats them as linear layers (for ia3).
        base = trained.get_base_model()
        if (state := prepared(base)) is not None:
            for change in state.undo:
                if isinstance(change, Int8Weight):
                    change.remove()  # LoRA is merged into the weight that was kept
        for name, module in list(base.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                base.set_submodule(name, module.modules_to_save[module.active_adapter])
        model = trained.merge_and_unload()
        model.__dict__.pop(WRAPPER, None)
    return model if prepared(model) is None else restore(model)


def save_trained_adapter(
    trained: nn.Module, directory: Path, dtype: torch.dtype | None = torch.float32, origin: Origin | None = None
) -> None:
    """Write what a method trained as an adapter: in fastln's form for norms, in peft's form for peft's methods.

    Args:
        trained: what `put_method` returned, before `to_stock`.
        directory: a new folder.
        dtype: dtype of its norms, as `save_adapter` takes it; peft's adapters keep their own dtype.
        origin: as `save_adapter` takes it.

    Raises:
        FastLNError: for what no adapter can hold (`full`, `bitfit`, norms with lora, plain torch), with the reason; or
            if the folder cannot be written to. The folder then does not appear.
    """
    try:
        with written_whole(directory) as beside:
            write_trained_adapter(trained, beside, dtype, origin)
    except (OSError, SafetensorError) as error:
        raise FastLNError(f"{directory}: the adapter cannot be written: {error}") from error


def is_on_prepared(trained: nn.Module) -> bool:
    """Whether peft's layers lie on a prepared model in what `put_method` returned.

    Then what trains of the model itself is unknown to peft.
    """
    return isinstance(trained, peft.PeftModel) and prepared(trained.get_base_model()) is not None


def write_trained_adapter(trained: nn.Module, folder: Path, dtype: torch.dtype | None, origin: Origin | None) -> None:
    """Write the files of an adapter into an existing folder; the arguments are those of `save_trained_adapter`.

    Raises:
        NoAdapterError: for what no adapter can hold. Nothing is written then.
        OSError: if a file cannot be written.
    """
    if isinstance(trained, peft.PeftModel):
        contents = _write_peft(trained, folder, origin)
    else:
        contents = adapter_contents(trained, dtype, origin)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


def _write_peft(trained: peft.PeftModel, folder: Path, origin: Origin | None) -> dict[str, bytes]:
    """Write the files of peft's adapter, and return the contents of those that come beside them or in their place."""
    base, config = trained.get_base_model(), trained.active_peft_config
    state = prepared(base)
    if state is not None and state.plan.method != FROZEN:
        raise NoAdapterError("an adapter holds either norms or peft's layers, and here both train")
    config.base_model_name_or_path = (origin and origin.source) or name_or_path(base)
    # "auto" compares the vocabulary's size with the base's, which peft looks for on the hub under this name.
    is_made = origin is not None and (origin.model or "").partition(":")[0] == "dual"
    # `state_dict` would make the weights that 8-bit ones replaced.
    values = dict(trained.named_parameters()) if state is not None else None
    trained.save_pretrained(str(folder), save_embedding_layers=False if is_made else "auto", state_dict=values)
    contents = {} if origin is None else {ORIGIN: origin_bytes(origin)}
    if (states := extra_states(base)) is not None:
        contents[EXTRA] = states
    further = changed_buffers(trained)  # peft knows only its own layers
    also = () if state is None else state.plan.also
    for module in also:
        held = base.get_submodule(module).state_dict(prefix=f"{PEFT_PREFIX}{module}.")
        further |= {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}
    if further:
        tensors, metadata = read_tensors(folder / WEIGHTS)
        further = {name.replace(f".modules_to_save.{trained.active_adapter}", ""): t for name, t in further.items()}
        tensors |= {name: tensor.cpu().contiguous() for name, tensor in further.items() if name not in tensors}
        contents[WEIGHTS] = save(tensors, metadata)
    if also:
        written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        contents[CONFIG] = json.dumps(written | {"modules_to_save": list(also)}, indent=2, sort_keys=True).encode()
    return contents


def load_trained_adapter(model: nn.Module, directory: Path, *, check_base: bool = True) -> nn.Module:
    """Load an adapter that `save_trained_adapter` or peft wrote into a stock model.

    Args:
        model: the base that it was trained on; it is changed in place.
        directory: the adapter's folder.
        check_base: as `load_adapter` takes it.

    Returns:
        The stock model with the adapter's values in it.

    Raises:
        FastLNError: if the folder holds no complete adapter, if the adapter does not fit the model, or if it holds
            virtual tokens; also as in `load_adapter`.
    """
    if (kind := adapter_type(directory)) in (LN_TUNING, PARTS):
        with warnings.catch_warnings():
            # The model is scored in its own dtype, as `fastln train` saves and scores it.
            warnings.filterwarnings("ignore", message=".* rounds ")
            load_adapter(model, directory, check_base=check_base)
        return model
    if kind in _VIRTUAL:
        raise FastLNError(
            f"{directory}: this is a {kind} adapter; its virtual tokens cannot become part of a model, so only peft "
            "can load it"
        )
    with loading(str(directory)):
        wrapped = peft.PeftModel.from_pretrained(model, str(directory), autocast_adapter_dtype=False)
        load_extra_states(wrapped.get_base_model(), directory)
    return to_stock(wrapped)


def _with_lora(model: nn.Module, settings: MethodSettings, do: Callable[[Plan, nn.Module], None]) -> nn.Module:
    # Find the names before `prepare` replaces any module with a stand-in.
    config = _peft_config(model, replace(settings, method="lora"))
    do(plan(model, **replace(settings, method=_BESIDE_LORA[settings.method]).of_plan), model)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with merges_are_refused():  # by LoraOn8Bits
        wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in own:
        parameter.requires_grad_(True)
    for module in wrapped.modules():
        if type(module) is lora.Linear and not module.get_base_layer().weight.is_floating_point():
            module.__class__ = LoraOn8Bits
    return wrapped


class LoraOn8Bits(lora.Linear):
    """peft's layer of LoRA on a layer in 8 bits. Once that has its own weight again it merges as peft's does."""

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge into the layer's weight.

        Raises:
            FastLNError: If the weight is in 8 bits.
        """
        if not self.get_base_layer().weight.is_floating_point():
            raise FastLNError(
                "LoRA cannot be merged into weights in 8 bits: save the adapter or a checkpoint, which fastln merge "
                "merges into the base"
            )
        super().merge(*args, **kwargs)


def _peft_config(model: nn.Module, settings: MethodSettings) -> peft.PeftConfig:
    """Return peft's configuration of a method, with LoRA's usual settings for LoRA and its variants."""
    method = settings.method
    inside = parameters_in(model, settings.scope) - _inside(model, settings.also)
    if method == "layernorm":
        return peft.LNTuningConfig(target_modules=[name for name, _ in find_norms(model) if f"{name}.weight" in inside])
    attention = {
        name for name, module in attention_maps(model).items() if _is_linear(module) and f"{name}.weight" in inside
    }
    if method == "ia3":
        scaled = [name for name in attention if IA3_TARGETS.search(name)]
        # The layer after the hidden units is the last in a block.
        hidden = [list(maps)[-1] for maps in ffn_maps(model).values() if _is_linear(list(maps.values())[-1])]
        hidden = [name for name in hidden if f"{name}.weight" in inside]
        return peft.IA3Config(target_modules=_found(scaled, method, model) + hidden, feedforward_modules=hidden)
    targets = _found([name for name in attention if LORA_TARGETS.search(name)], method, model)
    if method == "vera":
        return peft.VeraConfig(target_modules=targets)
    lora = {"lora_alpha": 2 * LORA_RANK, "lora_dropout": 0.1, "target_modules": targets}
    if method == "adalora":
        # The trainer sets the number of steps once it knows it.
        return peft.AdaLoraConfig(**lora, target_r=LORA_RANK, init_r=12, total_step=1)
    return peft.LoraConfig(**lora, r=LORA_RANK, use_dora=method == "dora")


def _prompt_config(model: nn.Module, settings: MethodSettings) -> peft.PromptLearningConfig:
    method, scope = settings.method, settings.scope
    name = type(model).__name__
    task = next((task for task, classes in _TASK_TYPES.items() if name in classes.values()), None)
    if task is None:
        raise FastLNError(
            f"method {method!r} puts virtual tokens before the input of a causal, sequence-to-sequence or "
            f"sequence-classification language model, which {name} is not"
        )
    if scope is not None:
        raise FastLNError(f"method {method!r} works on the whole model's input; leave out the scope {scope!r}")
    if method == "prefix":
        return peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=N_VIRTUAL_TOKENS)
    if method == "p-tuning":
        return peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=N_VIRTUAL_TOKENS, encoder_hidden_size=128)
    return peft.PromptTuningConfig(task_type=task, num_virtual_tokens=N_VIRTUAL_TOKENS)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _found(names: list[str], method: str, model: nn.Module) -> list[str]:
    if not names:
        raise FastLNError(
            f"method {method!r} finds no attention projections in {type(model).__name__} (linear layers called query, "
            "q_proj, qkv, c_attn and the like)"
        )
    return sorted(names)

"""Engines set up a model for a method: fastln itself, plain torch, or peft. All train the same kinds of parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import peft
import torch
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
    LN_TUNING,
    PARTS,
    WEIGHTS,
    NoAdapterError,
    adapter_contents,
    adapter_type,
    load_adapter,
    name_or_path,
    read_tensors,
)
from fastln.changes import EXTRA, changed_buffers, extra_states, load_extra_states, mark_buffers
from fastln.errors import FastLNError, loading
from fastln.families import find_norms, parameters_in
from fastln.families.parts import attention_maps, ffn_maps
from fastln.files import written_whole
from fastln.methods import IA3_TARGETS, LORA_RANK, LORA_TARGETS, get_method, select_parameters, settle_scope
from fastln.origin import ORIGIN, Origin, origin_bytes
from fastln.plan import prepared, settle_without
from fastln.prepare import prepare, restore

N_VIRTUAL_TOKENS = 20
PROMPT_METHODS = ("prefix", "p-tuning", "prompt")
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
) -> nn.Module:
    """Set up any model for `method`, in place.

    Args:
        model: the model.
        method: as `fastln.methods.get_method` takes it.
        engine: the engine that runs it; the method's first by default.
        scope: as `fastln.prepare` takes it.
        also: names of further modules that train in full.
        without: names of what `fastln.prepare` leaves out; for engine `fastln` only.
        backend: the backend of fastln's operations; for engine `fastln` only.

    Returns:
        The module to train: the model itself, or peft's wrapper of it.

    Raises:
        FastLNError: for an unknown method, engine or scope, a model in which the method matches nothing, or `without`
            or a backend with another engine.
    """
    method, scope = settle_scope(method, scope)
    also = (also,) if isinstance(also, str) else tuple(also)
    _, engine = get_method(method, engine)
    check_without(without, engine)
    if backend != "auto" and engine != "fastln":
        raise FastLNError(f"engine {engine!r} runs stock code: backend {backend!r} is for engine 'fastln'")
    trained = _put(model, method, engine, scope, also, without, backend)
    mark_buffers(trained)
    return trained


def _put(
    model: nn.Module,
    method: str,
    engine: str,
    scope: str | Iterable[str] | None,
    also: tuple[str, ...],
    without: str | Iterable[str],
    backend: str,
) -> nn.Module:
    if engine == "torch":
        trained = select_parameters(model, get_method(method, engine)[0], scope, also)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        return model
    if method == "layernorm+lora":
        return _norms_and_lora(model, scope, also, without, backend)
    if engine == "fastln":
        return prepare(model, method, scope=scope, also=also, without=without, backend=backend)
    config = _peft_config(model, method, scope)
    if isinstance(config, peft.PromptLearningConfig):
        if also:
            raise FastLNError(
                f"method {method!r} trains only its virtual tokens; it cannot train {', '.join(also)} too"
            )
    else:
        config.modules_to_save = list(also) or None
    # The optimizer keeps float32 copies of low-precision parameters for every engine; peft's own would slow it down.
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def check_without(without: str | Iterable[str], engine: str) -> None:
    """Check that `prepare` knows the names in `without`, and that they fit the engine.

    Raises:
        FastLNError: for an unknown name, or any name with an engine other than `fastln`.
    """
    names = settle_without(without)
    if names and engine != "fastln":
        raise FastLNError(
            f"engine {engine!r} runs stock code, so there is nothing to leave out: without {', '.join(names)} is for "
            "engine 'fastln'"
        )


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


def to_stock(trained: nn.Module) -> nn.Module:
    """Return the stock model with the trained values in it.

    Args:
        trained: what `put_method` returned. The model in it is changed in place.
    """
    model = trained
    if isinstance(trained, peft.PeftModel):
        # peft leaves its wrappers around modules in `also` (for norms), or treats them as linear layers (for ia3).
        base = trained.get_base_model()
        for name, module in list(base.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                base.set_submodule(name, module.modules_to_save[module.active_adapter])
        model = trained.merge_and_unload()
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


def write_trained_adapter(trained: nn.Module, folder: Path, dtype: torch.dtype | None, origin: Origin | None) -> None:
    """Write the files of an adapter into an existing folder; the arguments are those of `save_trained_adapter`.

    Raises:
        NoAdapterError: for what no adapter can hold. Nothing is written then.
        OSError: if a file cannot be written.
    """
    if not isinstance(trained, peft.PeftModel):
        contents = adapter_contents(trained, dtype, origin)
    elif prepared(trained.get_base_model()) is not None:
        raise NoAdapterError("an adapter holds either norms or peft's layers, and here both train")
    else:
        config = trained.active_peft_config
        config.base_model_name_or_path = (origin and origin.source) or name_or_path(trained.get_base_model())
        trained.save_pretrained(str(folder))
        contents = {} if origin is None else {ORIGIN: origin_bytes(origin)}
        if (states := extra_states(trained.get_base_model())) is not None:
            contents[EXTRA] = states
        if further := changed_buffers(trained):  # peft knows only its own layers
            tensors, metadata = read_tensors(folder / WEIGHTS)
            further = {name.replace(f".modules_to_save.{trained.active_adapter}", ""): t for name, t in further.items()}
            tensors |= {name: tensor.cpu().contiguous() for name, tensor in further.items() if name not in tensors}
            contents[WEIGHTS] = save(tensors, metadata)
    for name, content in contents.items():
        (folder / name).write_bytes(content)


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


def _norms_and_lora(
    model: nn.Module,
    scope: str | Iterable[str] | None,
    also: tuple[str, ...],
    without: str | Iterable[str],
    backend: str,
) -> nn.Module:
    # Find the names before `prepare` replaces any module with a stand-in.
    config = _peft_config(model, "lora", scope)
    prepare(model, "layernorm", scope=scope, also=also, without=without, backend=backend)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in own:
        parameter.requires_grad_(True)
    return wrapped


def _peft_config(model: nn.Module, method: str, scope: str | Iterable[str] | None) -> peft.PeftConfig:
    """Return peft's configuration of a method, with LoRA's usual settings for LoRA and its variants."""
    inside = parameters_in(model, scope)
    if method == "layernorm":
        return peft.LNTuningConfig(target_modules=[name for name, _ in find_norms(model) if f"{name}.weight" in inside])
    if method in PROMPT_METHODS:
        return _prompt_config(model, method, scope)
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
    settings = {"lora_alpha": 2 * LORA_RANK, "lora_dropout": 0.1, "target_modules": targets}
    if method == "adalora":
        # The trainer sets the number of steps once it knows it.
        return peft.AdaLoraConfig(**settings, target_r=LORA_RANK, init_r=12, total_step=1)
    return peft.LoraConfig(**settings, r=LORA_RANK, use_dora=method == "dora")


def _prompt_config(model: nn.Module, method: str, scope: str | Iterable[str] | None) -> peft.PeftConfig:
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

"""fastln merge: from a base model and an adapter to a model that needs neither peft nor fastln."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, PreTrainedModel

from fastln.adapters import LN_TUNING, adapter_type, load_adapter, save_merged
from fastln.engines import load_trained_adapter
from fastln.errors import FastLNError
from fastln.files import STAGING, written_whole
from fastln.models import Task, llava_med
from fastln.models.chat_vision import llava_processor
from fastln.models.sources import check_source, load_tokenizer, loading, saved_model
from fastln.prepare import prepare


def merge_into_base(base: str, adapter: Path, out: Path, *, check_base: bool = True) -> None:
    """Write the base model with an adapter's values, in the base's dtype, and its tokenizer and image preprocessing.

    Args:
        base: directory or hub name of any transformers model, or the output folder of `fastln train`.
        adapter: the adapter's folder.
        out: a new or empty folder.
        check_base: as `fastln.load_adapter` takes it.

    Raises:
        FastLNError: if the model or the adapter cannot be loaded, they do not fit, or `out` holds something.
    """
    if out.is_file() or (out.is_dir() and any(path.name != STAGING for path in out.iterdir())):
        raise FastLNError(f"{out}: is there already; give a new folder for the merged model")
    base = saved_model(base)
    check_source(base)
    kind = adapter_type(adapter)  # before the base is loaded, which may take minutes
    with loading(base):
        model, tools = _load(base)
    if kind == LN_TUNING:
        # Prepared, its norms are float32: rounding comes last, with its warning.
        load_adapter(prepare(model), adapter, check_base=check_base)
    else:
        task = Task(model, name=base)
        load_trained_adapter(task, adapter)
        model = task.model
    try:
        with written_whole(out) as beside:
            save_merged(model, beside)
            for tool in tools:
                tool.save_pretrained(beside)
    except (OSError, SafetensorError) as error:
        raise FastLNError(f"{out}: the model cannot be written, and nothing there changed: {error}") from error


def _load(base: str) -> tuple[PreTrainedModel, list[Any]]:
    """Return the model, and what is to be saved beside it: its tokenizer and preprocessing."""
    if llava_med.is_llava_med(base):
        llava, tokenizer, images = llava_med.load(base, "auto")
        return llava, [tokenizer, llava_processor(llava.config, images, tokenizer)]
    names = AutoConfig.from_pretrained(base).architectures or [""]
    model = getattr(transformers, names[0], AutoModel).from_pretrained(base, dtype="auto")
    tools = []
    for load in (load_tokenizer, AutoImageProcessor.from_pretrained, AutoProcessor.from_pretrained):
        # A model may lack any; and a processor of images and videos asks for torchvision.
        with contextlib.suppress(OSError, ValueError, KeyError, ImportError, AttributeError):
            tools.append(load(base))
    return model, tools

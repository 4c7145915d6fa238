"""fastln merge: merges a base model and an adapter into one model that needs neither peft nor fastln."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from fastln.adapters import LN_TUNING, adapter_type, load_adapter
from fastln.engines import load_trained_adapter
from fastln.errors import FastLNError, loading
from fastln.files import STAGING, expanded, user_path, written_whole
from fastln.merge import save_merged
from fastln.models import llava_med
from fastln.models.chat_vision import llava_processor
from fastln.models.sources import check_source, file_of, load_tokenizer, saved_model
from fastln.plan import apply, plan
from fastln.standins.tricks import TRICKS

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"


def merge_into_base(base: str, adapter: Path, out: Path, *, check_base: bool = True) -> None:
    """Write the base model with an adapter's values, in the base's dtype, and its tokenizer and image preprocessing.

    Args:
        base: directory or hub name of any transformers model, or the output folder of `fastln train`.
        adapter: the adapter's folder.
        out: a new or empty folder.
        check_base: as `fastln.load_adapter` takes it.

    Raises:
        FastLNError: if the model or the adapter cannot be loaded, if they do not fit, or if `out` is not empty.
    """
    base, adapter, out = expanded(base), user_path(adapter), user_path(out)
    if out.is_file() or (out.is_dir() and any(path.name != STAGING for path in out.iterdir())):
        raise FastLNError(f"{out}: is there already; give a new folder for the merged model")
    base = saved_model(base)
    check_source(base)
    kind = adapter_type(adapter)  # before the base is loaded, which may take minutes
    with loading(base):
        model, tools = _load(base)
    if kind == LN_TUNING:
        # In a prepared model the norms are float32, so they are rounded last, with a warning. The model never runs.
        apply(plan(model, without=TRICKS, backend="reference"), model)
        load_adapter(model, adapter, check_base=check_base)
    else:
        if not check_base:
            logger.warning("check_base has no effect: peft writes no fingerprint of the base into a %s adapter", kind)
        model = load_trained_adapter(model, adapter)
    try:
        with written_whole(out) as beside:
            save_merged(model, beside)
            for tool in tools.values():
                tool.save_pretrained(beside)
    except (OSError, SafetensorError) as error:
        raise FastLNError(f"{out}: the model cannot be written, and nothing there changed: {error}") from error
    logger.info("%s: wrote the model%s", out, "".join(f", its {name}" for name in tools))


def _load(base: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model and its companions by kind: its tokenizer and preprocessing."""
    if llava_med.is_llava_med(base):
        llava, tokenizer, images = llava_med.load(base, "auto")
        return llava, {"tokenizer": tokenizer, "processor": llava_processor(llava.config, images, tokenizer)}
    names = AutoConfig.from_pretrained(base).architectures or [""]
    model = getattr(transformers, names[0], AutoModel).from_pretrained(base, dtype="auto")
    has_tokenizer = any(file_of(base, name) for name in TOKENIZER_FILES)
    preprocessor = file_of(base, PREPROCESSOR)
    tools = {}
    if has_tokenizer:
        tools["tokenizer"] = _tool(base, "tokenizer", load_tokenizer)
    if preprocessor is not None:
        tools["preprocessor"] = _tool(base, "preprocessor", _load_preprocessor)
    if file_of(base, PROCESSOR) or (has_tokenizer and preprocessor is not None):
        processor = _tool(base, "processor", AutoProcessor.from_pretrained)
        # If a model has no processor class, this is its tokenizer again.
        tools["processor"] = processor if isinstance(processor, ProcessorMixin) else None
    return model, {name: tool for name, tool in tools.items() if tool is not None}


def _tool(base: str, name: str, load: Any) -> Any | None:
    """Load a companion of the base model; if it is broken, warn and return None."""
    try:
        with loading(base):
            return load(base)
    except FastLNError as error:
        logger.warning("the merged model gets no %s: that of %s", name, error)
        return None


def _load_preprocessor(base: str) -> Any:
    path = file_of(base, PREPROCESSOR)
    assert path is not None
    # Audio preprocessing uses the same file name, and only it has a sampling rate.
    is_audio = "sampling_rate" in json.loads(path.read_text(encoding="utf-8"))
    return (AutoFeatureExtractor if is_audio else AutoImageProcessor).from_pretrained(base)

"""fastln merge: merges a base model and an adapter into one model that needs neither peft nor fastln."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
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

from fastln.adapters import LN_TUNING, PARTS, adapter_type, load_adapter, named_class
from fastln.errors import FastLNError, loading
from fastln.files import STAGING, user_path, written_whole
from fastln.merge import save_merged
from fastln.models import is_bare, llava_med
from fastln.models.chat_task import ChatTask
from fastln.models.chat_vision import CHAT_VISION, llava_processor
from fastln.models.images import ImageInputs, ImagePixels
from fastln.models.sources import check_source, expanded_sources, file_of, load_tokenizer, saved_model
from fastln.origin import read_origin
from fastln.plan import apply, plan
from fastln.rates import DTYPES
from fastln.standins.tricks import TRICKS
from fastln.training.tasks import base_of, load_base, load_values

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


def merge_into_base(base: str | None, adapter: Path, out: Path, *, check_base: bool = True) -> None:
    """Write the base model with an adapter's values, in the base's dtype, and its tokenizer and image preprocessing.

    Args:
        base: directory or hub name of any transformers model, the output folder of `fastln train`, or any value of its
            `--model`; by default the one that the adapter names.
        adapter: the folder of an adapter or a checkpoint.
        out: a new or empty folder.
        check_base: as `fastln.load_adapter` takes it.

    Raises:
        FastLNError: if the model or the adapter cannot be loaded, if they do not fit, or if `out` is not empty.
    """
    adapter, out = user_path(adapter), user_path(out)
    base = None if base is None else expanded_sources(base)
    if out.is_file() or (out.is_dir() and any(path.name != STAGING for path in out.iterdir())):
        raise FastLNError(f"{out}: is there already; give a new folder for the merged model")
    if base is None:
        adapter_type(adapter)
        base = base_of(adapter)
    is_ours = is_bare(base) or base.startswith("dual:")
    if not is_ours:
        base = saved_model(base).removeprefix("blip:").removeprefix("chat:")
        check_source(base)
    kind = adapter_type(adapter)  # before the base is loaded, which may take minutes
    if is_ours:
        model, tools = _load_task(base, adapter)
    else:
        with loading(base):
            model, tools = _load(base, named_class(adapter))
    if kind == LN_TUNING:
        # In a prepared model the norms are float32, so they are rounded last, with a warning. The model never runs.
        apply(plan(model, without=TRICKS, backend="reference"), model)
        load_adapter(model, adapter, check_base=check_base)
    else:
        if not check_base and kind != PARTS:
            logger.warning("check_base has no effect: peft writes no fingerprint of the base into a %s adapter", kind)
        model = load_values(model, adapter, check_base=check_base)
    if size := read_origin(adapter)[0].image_size:
        _resize(model, tools, size)
    try:
        with written_whole(out) as beside:
            save_merged(model, beside)
            for tool in tools.values():
                tool.save_pretrained(beside)
    except (OSError, SafetensorError) as error:
        raise FastLNError(f"{out}: the model cannot be written, and nothing there changed: {error}") from error
    logger.info("%s: wrote the model%s", out, "".join(f", its {name}" for name in tools))


def _load_task(base: str, adapter: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model that only fastln can make, two encoders with a head or a bare configuration, and its tools.

    It is in the wider of the encoders' dtypes, or in that of the training.
    """
    if base.startswith("dual:"):
        dtypes = []
        for source in (part.strip() for part in base.removeprefix("dual:").split(",")):
            check_source(source)
            with loading(source):
                dtypes.append(AutoConfig.from_pretrained(source).dtype or torch.float32)
        dtype = torch.promote_types(dtypes[0], dtypes[-1])
    else:
        dtype = DTYPES.get(read_origin(adapter)[0].dtype or "", torch.float32)
    task = load_base(adapter, base, None, dtype=dtype)
    tools: dict[str, Any] = {"tokenizer": task.tokenizer}
    if task.images is not None:
        tools["preprocessor"] = task.images.processor
    if isinstance(task, ChatTask) and task.images and task.chat_vision and task.chat_vision.processor:
        tools["processor"] = task.chat_vision.processor(task.model.config, task.images, task.tokenizer)
    return task.model, tools


def _resize(model: PreTrainedModel, tools: dict[str, Any], size: int) -> None:
    """Have the preprocessing make images of the size that they had in training."""
    images = tools.get("preprocessor")
    if images is None:
        return
    if (family := CHAT_VISION.get(model.config.model_type)) is not None:
        family.set_size(ImageInputs(images, torch.float32), model.config, size)
    else:
        images = ImagePixels(images, size, torch.float32).processor
    if (processor := tools.get("processor")) is not None and hasattr(processor, "image_processor"):
        processor.image_processor = images


def _load(base: str, named: str | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model and its companions by kind: its tokenizer and preprocessing.

    Args:
        base: a directory or hub name.
        named: the class that the adapter names; it may be another than the checkpoint's, as where a head was added.
    """
    if llava_med.is_llava_med(base):
        llava, tokenizer, images = llava_med.load(base, "auto")
        return llava, {"tokenizer": tokenizer, "processor": llava_processor(llava.config, images, tokenizer)}
    names = AutoConfig.from_pretrained(base).architectures or [""]
    cls = getattr(transformers, named or "", None) or getattr(transformers, names[0], AutoModel)
    model = cls.from_pretrained(base, dtype="auto")
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

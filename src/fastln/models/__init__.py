"""The models that fastln trains out of the box, each as a `VQATask`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastln.errors import FastLNError
from fastln.models import blip_task, chat_task, dual_task, llava_med
from fastln.models.chat_vision import CHAT_VISION
from fastln.models.dual_encoder import MODEL_TYPE, DualEncoder, DualEncoderConfig
from fastln.models.sources import check_source, expanded_sources, saved_model
from fastln.models.task import Task, VQATask

if TYPE_CHECKING:
    from fastln.data import VQADataset

__all__ = ["DualEncoder", "DualEncoderConfig", "Task", "VQATask", "load_task"]

SPECS = """dual (embedded, random weights), dual:VISION,TEXT (two directories or hub names), \
blip (embedded, random weights), blip:SOURCE, chat:SOURCE (a directory, a hub name or a configuration's .json file), \
or a directory that fastln train wrote"""


def load_task(
    spec: str,
    train_data: VQADataset,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
    image_size: int | None = None,
) -> VQATask:
    """Load the model that `spec` names.

    Args:
        spec: `dual`, `dual:VISION,TEXT`, `blip`, `blip:SOURCE`, `chat:SOURCE`, or a directory that `fastln train`
            wrote: its output folder, or the model in it.
        train_data: gives the answer vocabulary of a new dual encoder and the tokenizer of a bare configuration.
        dtype: dtype of the parameters.
        seed: seed for everything that is initialised randomly.
        device: the model's device.
        image_size: edge of the square, in pixels, that images are resized to (for Qwen2.5-VL: whose area they have at
            most); what stands beside the model by default. No weight depends on it.

    Raises:
        FastLNError: if `spec` is none of these, the model cannot be loaded, the data does not fit it, or it does not
            take images of this size.
    """
    task = _load(expanded_sources(spec), train_data, dtype, seed, image_size)
    if image_size is not None and isinstance(task, chat_task.ChatTask):
        task.set_image_size(image_size)
    task.check_data(train_data)
    task.model.to(device)
    return task


def _load(spec: str, train_data: VQADataset, dtype: torch.dtype, seed: int, image_size: int | None) -> VQATask:
    kind, _, rest = spec.partition(":")
    if spec == "dual":
        return dual_task.embedded(train_data, dtype, seed, image_size)
    if spec == "blip":
        return blip_task.from_config(blip_task.embedded_config(), train_data, dtype, seed, image_size, "blip")
    if kind == "dual":
        vision, _, text = (source.strip() for source in rest.partition(","))
        if not vision or not text or "," in text:
            raise FastLNError(f"model {spec!r}: give two sources after 'dual:', VISION,TEXT, with one comma between")
        return dual_task.from_towers(vision, text, train_data, dtype, seed, image_size)
    if kind == "blip":
        return blip_task.from_source(rest, train_data, dtype, seed, image_size)
    if kind == "chat":
        return chat_task.from_source(rest, train_data, dtype, seed)
    spec = saved_model(spec)
    if not Path(spec).is_dir():
        raise FastLNError(f"model {spec!r}: this is neither a directory nor a known form; valid: {SPECS}")
    check_source(spec)
    model_type = _model_type(Path(spec) / "config.json")
    if model_type == MODEL_TYPE:
        return dual_task.from_saved(spec, train_data, dtype, image_size)
    if model_type == "blip":
        return blip_task.from_source(spec, train_data, dtype, seed, image_size)
    if model_type in {*chat_task.MODEL_TYPES, llava_med.MODEL_TYPE}:
        return chat_task.from_source(spec, train_data, dtype, seed)
    raise FastLNError(
        f"{spec}: model_type is {model_type!r}; a directory must hold {MODEL_TYPE!r}, 'blip' or a model that chats "
        f"({', '.join(CHAT_VISION)}, or a causal language model)"
    )


def _model_type(path: Path) -> str | None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise FastLNError(f"{path}: not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FastLNError(f"{path}: cannot be read: {error}") from None
    return config.get("model_type") if isinstance(config, dict) else None

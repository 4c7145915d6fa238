"""Image sizes other than a vision encoder's own: which sizes it takes, and with which arguments.

No weight changes: if an encoder has learned positions for the patches of its own size, transformers interpolates them
(bicubic) in every forward that asks for it. So an adapter's base is the same for all image sizes.
"""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from fastln.errors import FastLNError

INTERPOLATE = "interpolate_pos_encoding"
"""transformers' name of the argument."""


def check_size(image_size: int, patch: int) -> None:
    """Check that a square of `image_size`² pixels is made of whole patches of `patch`² pixels.

    Raises:
        FastLNError: if it is not; the message names the nearest that are.
    """
    if image_size <= 0 or image_size % patch:
        below = image_size // patch * patch
        nearest = f"{below} or {below + patch}" if below > 0 else str(patch)
        raise FastLNError(
            f"image size {image_size}: it must be a multiple of {patch}, because images are cut into patches of "
            f"{patch} x {patch} pixels; the nearest: {nearest}"
        )


def check_size_for(config: PreTrainedConfig, image_size: int | None) -> None:
    """Check that an encoder can cut images of this size into whole patches; None and its own size always pass.

    Raises:
        FastLNError: as in `check_size`.
    """
    if image_size is not None and not _is_own(config, image_size):
        check_size(image_size, math.lcm(*_edges(getattr(config, "patch_size", None) or 1)))


def check_reads(encoder: PreTrainedModel, image_size: int) -> None:
    """Check that a vision encoder takes images of this size, by a trial run without weights.

    Raises:
        FastLNError: if it does not.
    """
    try:
        with torch.device("meta"):
            # A copy, because a model under construction clears the attention implementation of its sub-configurations.
            tried = type(encoder)(copy.deepcopy(encoder.config))
            tried(pixel_values=torch.empty(1, 3, image_size, image_size), **position_arguments(encoder, image_size))
    # Encoders fail in different ways: by a check, a view, or a sum of tensors whose shapes do not fit.
    except (ValueError, RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise FastLNError(
            f"image size {image_size}: {type(encoder).__name__} takes only images of its own size, because "
            f"transformers does not interpolate its positions ({reason}); leave the image size out"
        ) from error


def position_arguments(encoder: PreTrainedModel, image_size: int) -> dict[str, bool]:
    """Return the position arguments that a vision encoder's forward needs for this image size.

    There are none at its own size, and for encoders that interpolate by themselves (DINOv2) or whose positions have no
    fixed size (DINOv3).
    """
    takes = INTERPOLATE in inspect.signature(type(encoder).forward).parameters
    return {INTERPOLATE: True} if takes and not _is_own(encoder.config, image_size) else {}


def _is_own(config: PreTrainedConfig, image_size: int) -> bool:
    return set(_edges(getattr(config, "image_size", None))) == {image_size}


def _edges(size: Any) -> tuple[Any, ...]:
    """Return height and width, which some configurations give as two numbers."""
    return tuple(size) if isinstance(size, list | tuple) else (size,)

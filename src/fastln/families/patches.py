"""Recognise patch embeddings: convolutions that are linear layers of patches."""

from __future__ import annotations

from torch import nn


def is_patch_embedding(module: nn.Module) -> bool:
    """Whether a module is a plain convolution of pixels whose patches neither overlap nor leave gaps, as a ViT has it.

    A kernel that is a single pixel wide makes no patches, and what has more than four channels is no image.
    """
    return (
        type(module) in (nn.Conv2d, nn.Conv3d)
        and isinstance(module, (nn.Conv2d, nn.Conv3d))
        and module.kernel_size == module.stride
        and module.in_channels <= 4
        and max(module.kernel_size) > 1
        and all(size == 1 for size in module.dilation)
        and module.groups == 1
        and (module.padding == "valid" or all(size == 0 for size in module.padding))
    )

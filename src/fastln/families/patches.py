"""Recognise patch embeddings: convolutions that are linear layers of patches."""

from __future__ import annotations

from torch import nn


def is_patch_embedding(module: nn.Module) -> bool:
    """Whether a module is a plain convolution whose patches neither overlap nor leave gaps, such as that of a ViT.

    A kernel that is a single pixel wide makes no patches.
    """
    return (
        type(module) in (nn.Conv2d, nn.Conv3d)
        and isinstance(module, (nn.Conv2d, nn.Conv3d))
        and module.kernel_size == module.stride
        and max(module.kernel_size) > 1
        and all(size == 1 for size in module.dilation)
        and module.groups == 1
        and (module.padding == "valid" or all(size == 0 for size in module.padding))
    )

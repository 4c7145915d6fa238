"""The differentiable operations: here is decided what is kept for backward and which gradients are computed."""

from fastln.ops.attention import attention
from fastln.ops.layer_norm import layer_norm

__all__ = ["attention", "layer_norm"]

"""The differentiable operations: here is decided what is kept for backward and which gradients are computed."""

from fastln.ops.attention import attention
from fastln.ops.linear_cross_entropy import linear_cross_entropy
from fastln.ops.norm import dropout_add_norm, layer_norm, rms_norm
from fastln_kernels.reference import NormKind

__all__ = ["NormKind", "attention", "dropout_add_norm", "layer_norm", "linear_cross_entropy", "rms_norm"]

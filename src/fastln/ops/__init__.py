"""The differentiable operations. They decide what is kept for backward and which gradients are computed."""

from fastln.ops.activation import activation, gated_activation, packed_gated_activation
from fastln.ops.attention import attention
from fastln.ops.dropout import dropout
from fastln.ops.int8 import int8_linear
from fastln.ops.linear import linear
from fastln.ops.linear_cross_entropy import linear_cross_entropy
from fastln.ops.norm import dropout_add_norm, layer_norm, rms_norm
from fastln.ops.rotary import rotary
from fastln.ops.settings import OpSettings
from fastln_kernels.reference import NormKind
from fastln_kernels.reference_activation import ACTIVATION_KINDS, ActivationKind

__all__ = [
    "ACTIVATION_KINDS",
    "ActivationKind",
    "NormKind",
    "OpSettings",
    "activation",
    "attention",
    "dropout",
    "dropout_add_norm",
    "gated_activation",
    "int8_linear",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "packed_gated_activation",
    "rms_norm",
    "rotary",
]

"""What fastln recognises in transformers' model families: norms, activations, sub-models, attention."""

from fastln.families.activations import activation_kind
from fastln.families.norms import find_norms, find_other_norms, is_norm, is_stock_layer_norm
from fastln.families.scopes import SCOPES, leaves_out_only, parameters_in, parts_left_out, sub_models

__all__ = [
    "SCOPES",
    "activation_kind",
    "find_norms",
    "find_other_norms",
    "is_norm",
    "is_stock_layer_norm",
    "leaves_out_only",
    "parameters_in",
    "parts_left_out",
    "sub_models",
]

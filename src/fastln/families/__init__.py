"""What fastln knows of transformers' model families: norms, sub-models, attention."""

from fastln.families.norms import find_norms, is_norm, is_stock_layer_norm
from fastln.families.scopes import SCOPES, scope_prefixes

__all__ = ["SCOPES", "find_norms", "is_norm", "is_stock_layer_norm", "scope_prefixes"]

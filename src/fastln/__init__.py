"""Fast LayerNorm tuning of transformers: compute and store only what the norms are owed."""

from fastln import ops
from fastln.adapters import load_adapter, merge_adapter, save_adapter
from fastln.errors import FastLNError
from fastln.prepare import prepare, restore

__all__ = ["FastLNError", "load_adapter", "merge_adapter", "ops", "prepare", "restore", "save_adapter"]

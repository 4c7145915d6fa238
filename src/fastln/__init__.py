"""Fast LayerNorm tuning of transformers: compute and store only what the norms are owed."""

from fastln import ops
from fastln.errors import FastLNError
from fastln.prepare import prepare, restore

__all__ = ["FastLNError", "ops", "prepare", "restore"]

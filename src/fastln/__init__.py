"""Fast LayerNorm tuning of transformers: compute and store only what the norms are owed."""

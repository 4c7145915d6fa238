"""Tensors that wait until it is known what is read of them: logits, and rows of the last block."""

"""Late tensors: logits and rows of the last block, computed only when it is known what is read of them."""

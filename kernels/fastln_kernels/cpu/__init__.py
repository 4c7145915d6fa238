"""Operations for CPU tensors, in plain PyTorch: tensors in, tensors out."""

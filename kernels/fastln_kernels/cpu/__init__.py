"""Operations for CPU tensors: kernels in C++, and torch's own operations for machines without a compiler."""

"""Device code of fastln: tensors in, tensors out; no autograd, no modules, no transformers."""

"""fastln's device code: functions from tensors to tensors, without autograd, modules or transformers."""

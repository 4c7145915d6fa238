"""Models whose trained parameters have moved, as adapters are made of them."""

import family_models
import torch

import fastln


def tuned(name, also=(), dtype=torch.float32, scope=None):
    """A prepared model whose trained parameters have moved."""
    model = fastln.prepare(family_models.make(name).to(dtype), also=also, scope=scope, backend="reference")
    move(model)
    return model


def move(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def loss(model, name):
    with torch.no_grad():
        return model.eval()(**family_models.batch(name)).loss

"""Modules that stand in for stock ones and keep their parameter names."""

from __future__ import annotations

from torch import Tensor, nn

from fastln import ops


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over one dimension, computed by `fastln.ops.layer_norm`.

    γ and β may be float32 beside lower-precision input; the output has the input's dtype.
    """

    backend: str

    @classmethod
    def standing_in(cls, stock: nn.LayerNorm, backend: str) -> LayerNorm:
        """Make the module that replaces `stock`; the two share their Parameter objects."""
        module = cls(stock.normalized_shape, stock.eps, elementwise_affine=False)
        module.elementwise_affine = stock.elementwise_affine
        module.weight, module.bias = stock.weight, stock.bias
        module.backend = backend
        module.train(stock.training)
        return module

    def stock(self) -> nn.LayerNorm:
        """Make the stock module again, with the same Parameter objects."""
        module = nn.LayerNorm(self.normalized_shape, self.eps, elementwise_affine=False)
        module.elementwise_affine = self.elementwise_affine
        module.weight, module.bias = self.weight, self.bias
        module.train(self.training)
        return module

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `input` (..., n_cols) over its last dimension."""
        return ops.layer_norm(input, self.weight, self.bias, self.eps, backend=self.backend)

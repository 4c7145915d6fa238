"""What a block does after its attention, on rows that wait or on plain ones."""

import torch
from torch import nn
from torch.nn import functional as F

from fastln import ops
from fastln.ops import NormKind

BATCH, LENGTH, WIDTH = 2, 12, 6
N_ROWS = BATCH * LENGTH
LABELS = torch.full((BATCH, LENGTH), -100)
LABELS[0, 2], LABELS[1, 5], LABELS[1, 6] = 3, 0, 5


class Tail(nn.Module):
    """What a block does after its attention, and the model's last norm."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.out, self.up, self.down = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.norms = nn.ParameterList(torch.randn(WIDTH) for _ in range(4))
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.dropout = dropout

    def forward(self, attended, residual):
        hidden = residual + F.dropout(self.out(attended), 0.0, self.training)
        normed = ops.layer_norm(hidden, self.norms[0], self.norms[1])
        inner = ops.activation(ops.linear(normed, self.up.weight, self.up.bias), "gelu")
        hidden = hidden + self.scale * self.down(inner)
        if self.dropout:
            hidden = ops.dropout(hidden, self.dropout)
        kind, settings = NormKind(1e-5), {"dropout": self.dropout}
        return ops.dropout_add_norm(hidden, None, self.norms[2], self.norms[3], kind, **settings)


def inputs(dtype=torch.float32):
    torch.manual_seed(1)
    attended, residual = torch.randn(BATCH, LENGTH, 5), torch.randn(BATCH, LENGTH, WIDTH)
    return [x.to(dtype).requires_grad_() for x in (attended, residual)]


def loss_of(hidden, labels=LABELS, **settings):
    return F.cross_entropy(hidden.view(-1, WIDTH), labels.view(-1), **settings)


def check(got, want):
    for actual, expected in zip(got, want, strict=True):
        assert (actual is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)

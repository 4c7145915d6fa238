"""Logits that wait, and the uses of them that leave them uncomputed."""

import torch
from torch import nn
from torch.nn import functional as F

N_CLASSES = 7
LABELS = torch.tensor([[3, -100, 0, 6, 2], [-100, 5, 5, 1, -100]])


def rows(logits, labels=LABELS, **settings):
    return F.cross_entropy(logits.view(-1, N_CLASSES), labels.reshape(-1), **settings)


LAZY_USES = {
    "masked": lambda z: rows(z.float()),
    "causal": lambda z: rows(z.float(), F.pad(LABELS, (0, 1), value=-100)[..., 1:].contiguous()),
    "shifted": lambda z: rows(z[..., :-1, :].contiguous(), LABELS[..., 1:]),
    "module": lambda z: nn.CrossEntropyLoss(label_smoothing=0.1)(
        z[:, :-1].reshape(-1, z.size(-1)), LABELS[:, 1:].flatten()
    ),
    "the last": lambda z: F.cross_entropy(z[:, -3:, :].flatten(0, 1), LABELS[:, -3:].flatten(), reduction="sum"),
    "one sequence": lambda z: F.cross_entropy(z[1], LABELS[1]),
    "every other": lambda z: rows(z[:, ::2].contiguous().to(torch.float32), LABELS[:, ::2]),
    "each": lambda z: rows(z, reduction="none", label_smoothing=0.1).view(2, -1).sum(1).pow(2).sum(),
    "twice": lambda z: rows(z) + rows(z[:1], LABELS[:1].clamp_min(0), ignore_index=6),
    "scaled": lambda z: rows((z * 0.3).float() / 2),
    "scaled rows": lambda z: rows(0.3 * z[:, 1:], LABELS[:, 1:]),
    "capped": lambda z: rows(3 * torch.tanh(z / 3)),
    "capped rows": lambda z: rows(((z.float() / 3).tanh() * 3)[:, 1:].contiguous() * 0.5, LABELS[:, 1:]),
    "same": lambda z: rows(z.to(z.dtype).to(z.device).contiguous()),
}


def parts(dtype=torch.float32, d=4):
    torch.manual_seed(0)
    return [t.to(dtype).requires_grad_() for t in (torch.randn(2, 5, d), torch.randn(N_CLASSES, d), torch.randn(7))]

"""The arguments of `torch.nn.functional.cross_entropy`, bound in one place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastln.ops.linear_cross_entropy import IGNORE_INDEX


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """The cross-entropy of rows against class labels.

    Attributes:
        weight: The weight of each class, `(n_classes,)`, or None.
        ignore_index: The label of rows that are ignored.
        reduction: "mean", "sum" or "none".
        label_smoothing: From 0 to 1.
    """

    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float

    def __call__(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of `rows` (n_rows, n_classes) against `labels` (n_rows,), int64."""
        return F.cross_entropy(
            rows,
            labels,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


def bind(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, CrossEntropy] | None:
    """Return a call's rows, labels and settings; None if it has other shapes, probabilities or deprecated arguments."""
    is_rows_and_labels = input.ndim == 2 and target.dtype == torch.int64 and target.shape == input.shape[:1]
    if not is_rows_and_labels or target.device != input.device or size_average is not None or reduce is not None:
        return None
    return input, target, CrossEntropy(weight, ignore_index, reduction, label_smoothing)

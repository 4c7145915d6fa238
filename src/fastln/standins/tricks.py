"""The names that `without` takes: each change that `prepare` can leave out, with its gain and its risk."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trick:
    """One kind of change that can be left out.

    Attributes:
        name: Its name for `without`.
        gains: What the change improves.
        risk: What can go wrong, or what differs from stock code.
    """

    name: str
    gains: str
    risk: str


TRICKS: dict[str, Trick] = {
    trick.name: trick
    for trick in (
        Trick(
            "norms",
            "run as fused kernels and compute only the gradients that are needed",
            "none known; trained norms are float32 with or without this",
        ),
        Trick("activations", "store one tensor for backward, where stock code may store several", "none known"),
        Trick("dropout", "stores an 8-byte seed instead of a mask", "draws different random numbers than torch"),
        Trick("post_norms", "BERT's dropout, residual and norm run as one operation that stores x_hat", "none known"),
        Trick("gated_mlps", "store only the gate and up projections, not the activation or the product", "none known"),
        Trick(
            "attention",
            "runs compiled kernels on a CPU, or flash-attn on a GPU if installed; stores no dropout mask",
            "sums in a different order than sdpa; draws different random numbers for dropout",
        ),
        Trick(
            "rotary",
            "on a CPU, rotary positions turn queries and keys in one pass",
            "rounds 16-bit results once, where stock code rounds three times",
        ),
        Trick(
            "linears",
            "on a CPU, frozen linear layers pack their weight block by block, where faster, without a second copy",
            "none known",
        ),
        Trick(
            "late_logits",
            "in training, computes logits only for positions with a label",
            "outputs.logits is computed only if you read it; the loss sends no gradient through it",
        ),
        Trick(
            "late_rows",
            "in training, the last block computes only the tokens that are read",
            "hidden states of the last block are computed only if you read them",
        ),
        Trick(
            "cache",
            "in training, keys and values are not copied into a cache",
            "outputs.past_key_values is None in training",
        ),
        Trick(
            "checkpointing",
            "gradient checkpointing runs without reentry, so that norms behind frozen layers get gradients",
            "none known",
        ),
        Trick(
            "rounding",
            "a memory budget may have norms and activations keep 8 bits a number",
            "gradients differ from exact ones by the rounding",
        ),
        Trick(
            "arena",
            "keeps the freed memory of large CPU tensors for the next step",
            "replaces torch's CPU allocator in the whole process while a model is prepared",
        ),
        Trick(
            "random_heads",
            "a head that was not in the checkpoint trains whole, as if `also` named it",
            "a head whose values you loaded by other means trains too",
        ),
    )
}

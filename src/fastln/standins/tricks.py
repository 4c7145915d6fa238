"""The names by which `without` leaves out what `prepare` changes, with what each gains and risks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trick:
    """One kind of change that can be left out.

    Attributes:
        name: As `without` takes it.
        gains: What it is good for.
        risk: What can go wrong, or what differs from stock.
    """

    name: str
    gains: str
    risk: str


TRICKS: dict[str, Trick] = {
    trick.name: trick
    for trick in (
        Trick(
            "norms",
            "one kernel forward and one backward; only the gradients that are asked for",
            "none known; without it trained norms still hold float32",
        ),
        Trick("activations", "one tensor kept for backward, where stock code may keep several", "none known"),
        Trick("dropout", "no mask kept: eight bytes instead", "draws other random numbers than torch"),
        Trick("post_norms", "BERT's dense, dropout, add and norm keep x_hat alone", "none known"),
        Trick("gated_mlps", "keeps gate and up, not their product", "none known"),
        Trick(
            "attention",
            "compiled CPU kernels, or flash-attn on a GPU; no mask of dropout kept",
            "sums in another order than sdpa; draws other random numbers for dropout",
        ),
        Trick("linears", "frozen linear layers on a CPU lay their weight out block by block", "none known"),
        Trick(
            "late_logits",
            "logits are computed for positions with a label alone",
            "outputs.logits is a tensor that is computed when it is read; the loss sends no gradient through it",
        ),
        Trick(
            "late_rows",
            "the last block computes only the tokens that are read",
            "hidden states of the last block are tensors that are computed when they are read",
        ),
        Trick("cache", "no copies of keys and values in training", "outputs.past_key_values is None in training"),
        Trick(
            "checkpointing",
            "activation checkpoints run without reentry, so that norms behind frozen layers get gradients",
            "none known",
        ),
        Trick(
            "arena",
            "freed memory of large CPU tensors is kept for the next step",
            "replaces torch's CPU allocator in the whole process while a model is prepared",
        ),
    )
}

"""What attention in 8 bits costs in accuracy, beside bfloat16: `python scripts/attention_errors.py`.

One head's output and gradients against float64. bfloat16 tensors are the same for both.
"""

from types import ModuleType

import torch
from torch import Tensor

from fastln_kernels import reference_attention
from fastln_kernels.cpu import native_attention
from fastln_kernels.reference_attention import AttentionBackward, AttentionForward

TOKENS, DIM = 320, 64


def tensors(kind: str) -> list[Tensor]:
    """Return q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 4, TOKENS, DIM, generator=generator) for _ in range(4))
    shared = torch.randn(DIM, generator=generator)
    channels = torch.zeros(DIM)
    channels[[3, 40]] = 40
    match kind:
        case "all keys share a vector, 8 times as large":
            k += 8 * shared
        case "two channels of all keys at 40":
            k += channels
        case "all values share a vector, 3 times as large":
            v += 3 * shared
        case "scores 3 times as high":
            q *= 3
    return [x.bfloat16() for x in (q, k, v, dout)]


def outcome(implementation: ModuleType, given: list[Tensor], *, int8: bool) -> list[Tensor]:
    """Return the output and the gradients."""
    q, k, v, dout = given
    request = AttentionForward(q, k, v, DIM**-0.5, int8=int8)
    out, lse = implementation.attention_forward(request)
    wanted = AttentionBackward(request, dout, out, lse, need_dq=True, need_dk=True, need_dv=True)
    return [x.double().flatten() for x in (out, *implementation.attention_backward(wanted))]


def main() -> None:
    """Print the table."""
    print("| q, k, v, do: normal numbers | | error of o | cosine of dq | dk | dv |\n|---|---|---|---|---|---|")
    for kind in (
        "nothing else",
        "all keys share a vector, 8 times as large",
        "two channels of all keys at 40",
        "all values share a vector, 3 times as large",
        "scores 3 times as high",
    ):
        given = tensors(kind)
        exact = outcome(reference_attention, [x.double() for x in given], int8=False)
        for int8 in (False, True):
            found = outcome(native_attention, given, int8=int8)
            error = (found[0] - exact[0]).norm() / exact[0].norm()
            cosines = (torch.cosine_similarity(a, b, dim=0).item() for a, b in zip(found[1:], exact[1:], strict=True))
            print(
                f"| {kind} | {'8 bits' if int8 else 'exact'} | {100 * error:.2f}% |", *(f"{c:.5f} |" for c in cosines)
            )


if __name__ == "__main__":
    main()

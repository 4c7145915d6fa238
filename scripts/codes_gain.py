"""Time norms and activations that keep codes beside those that keep their input, forward and backward, on this CPU.

    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
    python scripts/codes_gain.py [--rows N] [--rounds N]

*Measured* in one process; the subjects take turns. The ratio is paired: in each round the time with codes over that
without, as the median over the rounds. The variables keep the C library from giving pages back between calls, as the
arena of a prepared model does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from fastln_kernels.cpu import native_activation, native_norm
from fastln_kernels.reference import NormBackward, NormForward, NormKind
from fastln_kernels.reference_activation import ActivationKind
from fastln_kernels.reference_codes import Bits, GatedBits

Step = Callable[[], object]
Pair = tuple[Step, Step]  # forward; backward, which reads what the forward kept


def norm_steps(n_rows: int, n_cols: int, dtype: torch.dtype, kind: NormKind) -> dict[str, Pair]:
    """Return the steps of a norm all of whose gradients are wanted; `exact` comes first, as everywhere here."""
    x, dy = torch.randn(2, n_rows, n_cols).to(dtype)
    weight, bias = torch.randn(2, n_cols)

    def pair(codes: bool) -> Pair:
        request = NormForward(x, weight, bias, kind, want_codes=codes)
        made = native_norm.norm_forward(request)
        saved = x if made.normed is None else made.normed
        back = NormBackward(dy, saved, weight, made.rstd, kind, codes, scale=made.scale)
        back = back._replace(need_dx=True, need_dweight=True, need_dbias=True)
        return lambda: native_norm.norm_forward(request), lambda: native_norm.norm_backward(back)

    return {"exact": pair(False), "8 bits": pair(True)}


def activation_steps(n_rows: int, n_cols: int, dtype: torch.dtype, kind: ActivationKind) -> dict[str, Pair]:
    """Return the steps of a plain activation."""
    x, dy = torch.randn(2, n_rows, n_cols).to(dtype)

    def pair(bits: Bits) -> Pair:
        codes = native_activation.activation_forward(x, kind, bits=bits)[1]
        return (
            lambda: native_activation.activation_forward(x, kind, bits=bits),
            lambda: native_activation.activation_backward(dy, codes, kind, bits=bits),
        )

    exact = (
        lambda: native_activation.activation_forward(x, kind),
        lambda: native_activation.activation_backward(dy, x, kind),
    )
    return {"exact": exact, "8 bits": pair(8), "4 bits": pair(4), "2 bits": pair(2)}


def gated_steps(n_rows: int, n_cols: int, dtype: torch.dtype, kind: ActivationKind) -> dict[str, Pair]:
    """Return the steps of a gated activation."""
    gate, up, dy = torch.randn(3, n_rows, n_cols).to(dtype)

    def pair(bits: GatedBits) -> Pair:
        codes = native_activation.gated_forward(gate, up, kind, bits=bits)[1]
        return (
            lambda: native_activation.gated_forward(gate, up, kind, bits=bits),
            lambda: native_activation.gated_backward(dy, codes, None, kind, need_dgate=True, need_dup=True),
        )

    exact = (
        lambda: native_activation.gated_forward(gate, up, kind),
        lambda: native_activation.gated_backward(dy, gate, up, kind, need_dgate=True, need_dup=True),
    )
    return {"exact": exact, "8 bits": pair(8), "4 bits": pair(4)}


def cases(n_rows: int, widths: tuple[int, ...] = (768, 3072)) -> dict[str, dict[str, Pair]]:
    """Return the subjects of every case, by its name."""
    found: dict[str, dict[str, Pair]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for n_cols in widths:
            at = f"{n_rows} x {n_cols}, {str(dtype).removeprefix('torch.')}"
            found[f"LayerNorm, {at}"] = norm_steps(n_rows, n_cols, dtype, NormKind(1e-5))
            found[f"GELU, {at}"] = activation_steps(n_rows, n_cols, dtype, "gelu")
            found[f"SwiGLU, {at}"] = gated_steps(n_rows, n_cols, dtype, "silu")
    return found


def seconds(step: Step) -> float:
    """Return how long a step takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(subjects: dict[str, Pair], n_rounds: int) -> dict[str, tuple[float, float, float]]:
    """Return the seconds of forward and backward, and the ratio of their sum to that of `exact`; all medians."""
    rounds = [{name: tuple(map(seconds, pair)) for name, pair in subjects.items()} for _ in range(n_rounds + 1)][1:]
    return {
        name: (
            median(times[name][0] for times in rounds),
            median(times[name][1] for times in rounds),
            median(sum(times[name]) / sum(times["exact"]) for times in rounds),
        )
        for name in subjects
    }


def main() -> None:
    """Print a line for each case and width of codes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3152)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    for case, subjects in cases(options.rows).items():
        for name, (forward, backward, ratio) in measure(subjects, options.rounds).items():
            print(
                f"{case:36} {name:7} {1e3 * forward:6.2f} + {1e3 * backward:6.2f} ms, {ratio:.2f} of exact", flush=True
            )


if __name__ == "__main__":
    main()

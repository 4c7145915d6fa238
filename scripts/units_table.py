"""Frozen linear layers with bfloat16 rows, multiplied in bfloat16 and in float32 in turns; `units.py` chooses.

Times the forward product and the gradient's for the layers of usual models, in processor time of one thread.
ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 makes a processor with matrix units behave like one without.
"""

import argparse
import os
import statistics
import time

import torch

from fastln_kernels.cpu import native_linear, units

SHAPES = ((1024, 768, 3072), (1024, 3072, 768), (1024, 768, 768), (1280, 1024, 2752), (256, 768, 3072))


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="rounds, of which the median counts")
    rounds = parser.parse_args().rounds
    rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in units.rates().items())
    torch.set_num_threads(1)
    print(f"GFLOP/s of one thread: {rates}\n")
    print("| rows x argument x result | product | bfloat16, ms | float32, ms | times as fast (range) |")
    print("|---|---|---|---|---|")
    for n_rows, n_inner, n_cols in SHAPES:
        for transpose in (True, False):
            x = torch.randn(n_rows, n_inner).bfloat16()
            weight = torch.randn((n_cols, n_inner) if transpose else (n_inner, n_cols)).bfloat16()
            seconds: dict[str, list[float]] = {name: [] for name in units.UNITS}
            for _ in range(1 + rounds):
                for name, times in seconds.items():
                    os.environ[units.VARIABLE] = name
                    start = time.thread_time()
                    native_linear.linear(x, weight, transpose=transpose)
                    times.append(time.thread_time() - start)
            narrow, wide = (times[1:] for times in seconds.values())  # the first is a warm-up
            ratios = sorted(a / b for a, b in zip(narrow, wide, strict=True))
            print(
                f"| {n_rows} x {n_inner} x {n_cols} | {'y = x Wᵀ' if transpose else 'dx = dy W'} | "
                f"{statistics.median(narrow) * 1e3:.1f} | {statistics.median(wide) * 1e3:.1f} | "
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
            )


if __name__ == "__main__":
    main()

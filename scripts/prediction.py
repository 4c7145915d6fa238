"""What a kernel's machine code and a GPU's data sheet say about its speed: a prediction, no measurement.

    share = useful bytes / bandwidth / sum over kernels of max(traffic time, waiting time, issue time)

- *Useful* is what any kernel must move for these results.
- *Traffic* is what this one exchanges with memory, over the bandwidth: the rows it reads and writes, partial sums, and
  of what follows only what no cache holds.
  - Rows that a program reads a second time count again, unless the rows of all programs that run at once fit into half
    of the L2.
  - Spills (loads and stores of a lane's stack) count where the stacks of all threads of an SM exceed the L1 that shared
    memory leaves, and then for the part of all SMs' stacks that the L2 cannot hold. What a cache serves costs no
    traffic here, only the issue of its instructions: that flatters kernels that spill.
- *Waiting* is the time in which the bytes asked for arrive, each after a latency of 600 ns (Little's law): all that is
  read or written, second reads too, times latency, over the bytes in flight; one latency at least. In flight is what a
  warp asks for before it first waits, times the warps that the SMs hold at once, or that there are.
  Where a kernel has several loops, that with the most loads stands for it.
- *Issue* is all warps' instructions over what the SMs issue: those of the loop in every turn, the others once. It is
  left out where a row takes several turns of the loop.

Caches otherwise, latencies that vary and launch times are not in it. It says which kernel has a reason to be slow, and
why. The same rules hold for every library. Liger's sums over its programs are torch's, two kernels that are not
compiled here; they are counted as if fastln's last kernel, one for both, did them: for as many rows as Liger has
programs.
"""

from __future__ import annotations

from typing import Any

from machines import Machine

LATENCY = 600e-9

Kernel = dict[str, Any]


def traffic(kernel: Kernel, machine: Machine) -> int:
    """Bytes that a launch exchanges with memory.

    Args:
        kernel: A kernel of a row's `compiled`.
        machine: What it was compiled for.
    """
    total: int = kernel["moved"]
    at_once = kernel["resident_warps"] // kernel["warps"]
    if at_once * machine.sms * kernel["read_twice"] // kernel["row_tiles"] > machine.l2 // 2:
        total += kernel["read_twice"]
    stacks = kernel["resident_warps"] * machine.lanes * kernel["stack"]
    if stacks > machine.l1_left(at_once * kernel["shared"]):
        beyond_l2 = max(0.0, 1 - machine.l2 / (stacks * machine.sms))
        total += int(beyond_l2 * machine.lanes * executed(kernel, "spill_bytes"))
    return total


def executed(kernel: Kernel, what: str) -> int:
    """How often all warps of a launch together do that of which the kernel has `what` and its loop `loop_what`."""
    in_loop: int = kernel[f"loop_{what}"]
    return int(kernel["warps"] * (kernel["programs"] * (kernel[what] - in_loop) + kernel["turns"] * in_loop))


def in_flight(kernel: Kernel) -> int:
    """Bytes that an SM's warps have asked for when they first wait."""
    return int(kernel["resident_warps"] * kernel["in_flight"])


def seconds(kernel: Kernel, machine: Machine) -> float:
    """The time of a launch."""
    moving = traffic(kernel, machine) / machine.bandwidth
    at_once = min(kernel["resident_warps"] * machine.sms, kernel["programs"] * kernel["warps"])
    turns = (kernel["moved"] + kernel["read_twice"]) / (at_once * kernel["in_flight"])
    waiting = max(turns, 1.0) * LATENCY
    if kernel["turns"] > kernel["row_tiles"]:
        return max(moving, waiting)
    issuing = executed(kernel, "instructions") / (machine.issue * machine.clock * machine.sms)
    return max(moving, waiting, issuing)


def predict(kernels: list[Kernel], useful_bytes: int, elements: int, machine: Machine) -> dict[str, float]:
    """The share of peak bandwidth, the time, and the traffic per element of a row of the report.

    Raises:
        ValueError: If a program is more than an SM holds, so that it cannot run there.
    """
    for kernel in kernels:
        if not kernel["resident_warps"]:
            raise ValueError(
                f"{kernel['kernel']} cannot run: its program of {kernel['warps']} warps is more than an SM holds"
            )
    total = sum(seconds(kernel, machine) for kernel in kernels)
    return {
        "share": round(useful_bytes / machine.bandwidth / total, 3),
        "seconds": float(f"{total:.4g}"),
        "bytes_per_element": round(sum(traffic(kernel, machine) for kernel in kernels) / elements, 3),
    }

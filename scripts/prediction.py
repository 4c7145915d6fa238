"""Predict a kernel's speed from its machine code and a GPU's data sheet. This is not a measurement.

    share = useful bytes / bandwidth / sum over kernels of max(traffic time, waiting time, issue time)

- *Useful* bytes are those that any kernel must move for these results.
- *Traffic* time is the bytes that this kernel exchanges with memory, divided by the bandwidth. It counts the rows that
  the kernel reads and writes, partial sums, and what the caches cannot hold of the following:
  - Rows that a program reads a second time count again, unless the rows of all programs that run at once fit into half
    of the L2 cache.
  - Spills (loads and stores of a lane's stack) count if the stacks of all threads of an SM exceed the L1 cache that
    shared memory leaves. Then the part of all SMs' stacks that the L2 cannot hold counts. Accesses that a cache serves
    cost no traffic here, only the issue of their instructions. That favours kernels that spill.
- *Waiting* time is the time until the requested bytes arrive, each after a latency of 600 ns (Little's law). It is all
  bytes read or written, including second reads, times the latency, divided by the bytes in flight, and at least one
  latency. The bytes in flight are those that a warp requests before it first waits, times the number of warps that the
  SMs hold at once, or of all warps if there are fewer. If a kernel has several loops, the one with the most loads
  counts.
- *Issue* time is the number of instructions of all warps, divided by the rate at which the SMs issue them. The loop's
  instructions count in every turn, the others once. Issue time is left out if a row takes several turns of the loop.

A *product* in 8 bits is predicted apart, as the longest of its traffic time (each tensor once), its operations at the
data sheet's rate, and its issue time. Waits between these are left out, so it is a bound. Its share is that of the data
sheet's rate. It is set beside a product in bfloat16 at the data sheet's rate, which is a bound too.

Other cache effects, varying latencies and launch times are not included. The prediction shows which kernel has a reason
to be slow, and which reason. The same rules apply to every library. Liger leaves the sums over its programs to torch,
in two kernels that are not compiled here. They are counted as one launch of fastln's last kernel, with as many rows as
Liger has programs.
"""

from __future__ import annotations

from typing import Any

from machines import Machine

LATENCY = 600e-9

Kernel = dict[str, Any]


def traffic(kernel: Kernel, machine: Machine) -> int:
    """Return the bytes that a launch exchanges with memory.

    Args:
        kernel: A kernel from a row's `compiled`.
        machine: The machine that it was compiled for.
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
    """Return the total of the figure `what` over all warps of a launch. `loop_what` is the loop's part of it."""
    in_loop: int = kernel[f"loop_{what}"]
    return int(kernel["warps"] * (kernel["programs"] * (kernel[what] - in_loop) + kernel["turns"] * in_loop))


def in_flight(kernel: Kernel) -> int:
    """Return the bytes that an SM's warps have requested when they first wait."""
    return int(kernel["resident_warps"] * kernel["in_flight"])


def seconds(kernel: Kernel, machine: Machine) -> float:
    """Return the predicted time of a launch, in seconds."""
    moving = traffic(kernel, machine) / machine.bandwidth
    at_once = min(kernel["resident_warps"] * machine.sms, kernel["programs"] * kernel["warps"])
    turns = (kernel["moved"] + kernel["read_twice"]) / (at_once * kernel["in_flight"])
    waiting = max(turns, 1.0) * LATENCY
    if kernel["turns"] > kernel["row_tiles"]:
        return max(moving, waiting)
    issuing = executed(kernel, "instructions") / (machine.issue * machine.clock * machine.sms)
    return max(moving, waiting, issuing)


def predict(kernels: list[Kernel], useful_bytes: int, elements: int, machine: Machine) -> dict[str, float]:
    """Return the share of peak bandwidth, the time, and the traffic per element for a row of the report.

    Raises:
        ValueError: If a program does not fit on an SM, so that it cannot run.
    """
    for kernel in kernels:
        if not kernel["resident_warps"]:
            raise ValueError(
                f"{kernel['kernel']} cannot run: its program of {kernel['warps']} warps does not fit on an SM"
            )
    total = sum(seconds(kernel, machine) for kernel in kernels)
    return {
        "share": round(useful_bytes / machine.bandwidth / total, 3),
        "seconds": float(f"{total:.4g}"),
        "bytes_per_element": round(sum(traffic(kernel, machine) for kernel in kernels) / elements, 3),
    }


def predict_product(
    kernel: Kernel, operations: int, inner_turns: int, elements: int, machine: Machine
) -> dict[str, float] | None:
    """Return the share of the peak of 8-bit operations, and what `predict` returns; None if the peak is not known.

    Args:
        kernel: The kernel of the product.
        operations: Multiplications and additions.
        inner_turns: Turns of a program's loop over the sum.
        elements: Elements of the result.
        machine: The machine that it was compiled for.

    Returns:
        Also `over_bf16`: how many times as long a product in bfloat16 takes at the data sheet's rate.

    Raises:
        ValueError: If a program does not fit on an SM.
    """
    if not kernel["resident_warps"]:
        raise ValueError(f"{kernel['kernel']} cannot run: its program does not fit on an SM")
    if machine.int8 is None:
        return None
    per_warp = kernel["instructions"] - kernel["loop_instructions"] + inner_turns * kernel["loop_instructions"]
    issuing = kernel["programs"] * kernel["warps"] * per_warp / (machine.issue * machine.clock * machine.sms)
    total = max(kernel["moved"] / machine.bandwidth, operations / machine.int8, issuing)
    return {
        "share": round(operations / machine.int8 / total, 3),
        "seconds": float(f"{total:.4g}"),
        "bytes_per_element": round(kernel["moved"] / elements, 3),
        "over_bf16": round(operations / machine.bf16 / total, 2),
    }

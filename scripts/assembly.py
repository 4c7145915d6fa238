"""Count instructions in listings of machine code: NVIDIA's SASS and AMD's GCN.

A *loop* is the code between a label and a branch back to it. If a kernel has several loops, "the loop" is the one with
the most loads from global memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Figures = dict[str, int]


@dataclass(frozen=True)
class Dialect:
    """Patterns for one vendor's listing. In `label` and `branch`, group 1 is the label's name."""

    label: str
    branch: str
    load: str
    store: str
    local: str
    barrier: str
    matrix: str


SASS = Dialect(
    label=r"^(\.L_x_\d+):",
    branch=r"\bBRA\S*\s.*?\(?(\.L_x_\d+)",
    load=r"\bLDG(?:STS)?\b",
    store=r"\bSTG\b",
    local=r"\b(?:LDL|STL)\b",
    barrier=r"\bBAR\b",
    matrix=r"\bIG?MMA\b",
)
GCN = Dialect(
    label=r"^(\.LBB\d+_\d+):",
    branch=r"^s_c?branch\S*\s+(\.LBB\d+_\d+)",
    load=r"^(?:global|buffer)_load",
    store=r"^(?:global|buffer)_store",
    local=r"^scratch_(?:load|store)",
    barrier=r"^s_barrier",
    matrix=r"^v_mfma_i32",
)


def longest_loop(code: list[str], dialect: Dialect) -> list[str]:
    """Return the body of the loop with the most loads; an empty list if there is no loop."""
    labels = {found[1]: index for index, line in enumerate(code) if (found := re.search(dialect.label, line))}
    bodies = []
    for index, line in enumerate(code):
        branch = re.search(dialect.branch, line)
        # The last instruction of every NVIDIA kernel is a branch to itself.
        if branch and labels.get(branch[1], index) < index - 1:
            bodies.append(code[labels[branch[1]] : index + 1])
    bodies = [body for body in bodies if count(body, dialect.load)]
    return max(bodies, key=lambda body: (count(body, dialect.load), -len(body)), default=[])


def count(lines: list[str], pattern: str) -> int:
    """Return how many lines match the pattern."""
    return sum(bool(re.search(pattern, line)) for line in lines)


def common_figures(code: list[str], dialect: Dialect, wide: str) -> Figures:
    """Return the figures that both vendors share. `wide` matches the mark of a 128-bit access.

    Returns:
        `loads` and `stores` of global memory (loads that copy to shared memory among them), and how many of them are
        128 bits wide. `matrix`: matrix instructions in 8 bits. Also `barriers`, `instructions` and `spill_bytes`, both
        for the whole kernel and, with the prefix `loop_`, for the loop. `spill_bytes` are the bytes that a lane moves
        to or from its stack if it executes each instruction once.
    """
    loop = longest_loop(code, dialect)

    def instructions(lines: list[str]) -> int:
        return len(lines) - count(lines, dialect.label)

    def spilled(lines: list[str]) -> int:
        return sum(access_bytes(line) for line in lines if re.search(dialect.local, line))

    return {
        "loads": count(code, dialect.load),
        "loads_128": count(code, dialect.load + wide),
        "stores": count(code, dialect.store),
        "stores_128": count(code, dialect.store + wide),
        "matrix": count(code, dialect.matrix),
        "barriers": count(code, dialect.barrier),
        "loop_barriers": count(loop, dialect.barrier),
        "instructions": instructions(code),
        "loop_instructions": instructions(loop),
        "spill_bytes": spilled(code),
        "loop_spill_bytes": spilled(loop),
    }


_SASS_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_GCN_WIDTHS = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "short": 2, "ushort": 2, "sshort": 2}
_GCN_WIDTHS |= {"byte": 1, "ubyte": 1, "sbyte": 1}


def access_bytes(line: str) -> int:
    """Return how many bytes a lane moves with one load or store instruction."""
    amd = re.match(r"(?:global|buffer|scratch)_(?:load|store)_(dwordx\d|[a-z]+)", line)
    if amd:
        return _GCN_WIDTHS[amd[1]]
    name = re.search(r"\b(?:LDGSTS|LDG|STG|LDL|STL)((?:\.\w+)*)", line)
    assert name, line
    return next((_SASS_WIDTHS[part] for part in name[1].split(".") if part in _SASS_WIDTHS), 4)


# NVIDIA


def sass_lines(listing: str) -> list[str]:
    """Return the instructions and labels of nvdisasm's listing."""
    lines = []
    for line in listing.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?;)", line)
        if label:
            lines.append(f"{label[1]}:")
        elif instruction:
            lines.append(instruction[1])
    return lines


def read_sass(listing: str, usage: str, ptx: str) -> Figures:
    """Read the figures of a kernel compiled for NVIDIA GPUs.

    Args:
        listing: The listing from nvdisasm.
        usage: The output of `cuobjdump -res-usage`.
        ptx: The PTX code that it was assembled from.
    """
    code = sass_lines(listing)
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "stack": _number(r"STACK:(\d+)", usage),
        "spills": count(code, SASS.local),
        **common_figures(code, SASS, r"\S*\.128\b"),
        "in_flight": 32 * sass_bytes_before_first_use(longest_loop(code, SASS) or code),
        "matrix_of_groups": count(code, r"\bIGMMA\b"),
        "truncations": count(code, r"\bF2F\S*\.RZ"),
        "nan_dropped": count(ptx.splitlines(), r"\b(?:max|min)\.f32"),
    }


def sass_bytes_before_first_use(code: list[str]) -> int:
    """Return how many bytes a lane has requested when an instruction first needs one of them."""
    awaited: set[int] = set()
    total = 0
    for line in code:
        load = re.search(r"\bLDG(?:\.\w+)*\s+R(\d+)", line)
        if load:
            width = access_bytes(line)
            total += width
            first = int(load[1])
            awaited.update(range(first, first + max(width // 4, 1)))
        elif any(int(register) in awaited for register in re.findall(r"\bR(\d+)\b", line)):
            # Writing to an awaited register waits too. Registers that are zeroed for a predicated load do not count
            # here, because the zeroing comes before the load.
            break
    return total


# AMD


def gcn_lines(listing: str) -> list[str]:
    """Return the instructions and labels of an assembly listing, without its comments and directives."""
    lines = (line.partition(";")[0].strip() for line in listing.splitlines())
    return [line for line in lines if re.match(r"(?:[vs]|global|buffer|scratch|flat|ds)_|\.LBB\d+_\d+:", line)]


def read_gcn(listing: str) -> Figures:
    """Read the figures of a kernel compiled for AMD GPUs, from its assembly and the metadata at the end."""
    code = gcn_lines(listing)
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", listing),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", listing),
        "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", listing),
        **common_figures(code, GCN, r"_dwordx4"),
        "in_flight": 64 * gcn_bytes_before_first_wait(longest_loop(code, GCN) or code),
    }


def gcn_bytes_before_first_wait(code: list[str]) -> int:
    """Return how many bytes a lane has requested when it first waits for memory (`s_waitcnt vmcnt`)."""
    total = 0
    for line in code:
        if re.search(GCN.load, line):
            total += access_bytes(line)
        elif total and re.match(r"s_waitcnt.*vmcnt", line):
            break
    return total


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, pattern
    return int(found[1])

"""Compiles Triton kernels for real GPUs without one, and reads off the machine code what it will do.

A launch is compiled as Triton would specialise it: launching functions run on CPU tensors with the launch itself
replaced by a note of its arguments (`noted_launches`), and each note is built for a target (`build`).
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Kernels are either interpreted or compiled, settled at their import.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}


@dataclass(frozen=True, slots=True)
class Machine:
    """A GPU that code is compiled for, from its vendor's data sheet.

    Attributes:
        target: what Triton compiles for.
        sms: streaming multiprocessors (compute units at AMD).
        bandwidth: of its memory, bytes per second.
        clock: cycles per second.
        registers: of 32 bits, per SM.
        max_warps: per SM.
        max_programs: per SM.
        shared: bytes of shared memory per SM.
    """

    target: GPUTarget
    sms: int
    bandwidth: float
    clock: float
    registers: int = 65536
    max_warps: int = 64
    max_programs: int = 32
    shared: int = 228 * 1024


MACHINES = {
    "sm_80": Machine(GPUTarget("cuda", 80, 32), sms=108, bandwidth=2.04e12, clock=1.41e9, shared=164 * 1024),
    "sm_90": Machine(GPUTarget("cuda", 90, 32), sms=132, bandwidth=3.35e12, clock=1.755e9),
    "sm_100": Machine(GPUTarget("cuda", 100, 32), sms=148, bandwidth=8.0e12, clock=1.85e9),
    # Four SIMDs of 512 registers for each of 64 lanes, 8 waves each.
    "gfx942": Machine(
        GPUTarget("hip", "gfx942", 64),
        sms=304,
        bandwidth=5.3e12,
        clock=2.1e9,
        registers=4 * 512 * 64,
        max_warps=32,
        shared=64 * 1024,
    ),
}


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with the arguments that it would be launched with."""

    kernel: JITFunction
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def programs(self) -> int:
        """How many programs the grid has."""
        n = 1
        for size in self.grid:
            n *= size
        return n


def noted_launches(function: Callable[[], Any]) -> list[Launch]:
    """Run a launching function and return its launches, none of which takes place."""
    noted: list[Launch] = []

    def note(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        noted.append(Launch(kernel, arguments, options, tuple(grid)))

    run = JITFunction.run
    JITFunction.run = note
    try:
        function()
    finally:
        JITFunction.run = run
    return noted


def build(launch: Launch, target: GPUTarget) -> Any:
    """Compile one launch as Triton would specialise it."""
    kernel = launch.kernel
    given = dict(zip(kernel.arg_names, launch.arguments, strict=False))
    given |= {name: value for name, value in launch.options.items() if name in kernel.arg_names}
    options = {name: value for name, value in launch.options.items() if name not in kernel.arg_names}
    constants, signature, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = given.get(name, parameter.default)
        specialised = isinstance(value, int) and not isinstance(value, bool) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{DTYPES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if specialised and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def specialises_on(kernel: JITFunction, names: tuple[str, ...]) -> bool:
    """Whether a new value of one of these run-time arguments may compile the kernel anew."""
    return not all(parameter.do_not_specialize for parameter in kernel.params if parameter.name in names)


def read(binary: Any, target: GPUTarget) -> dict[str, int]:
    """Read off a compiled kernel what it takes and does.

    Returns:
        `registers` per lane; `spills`, instructions that spill or fetch; `shared`, bytes; `loads` and `stores` to
        global memory, and how many of them are 128 bits wide; `barriers`; `loop_barriers`, those of them in a loop;
        `truncations`, casts to bfloat16 that do not round; `nan_dropped`, maxima that take the number where the other
        side is NaN; `in_flight`, bytes that a warp asks for in its loop (or, without one, from its start) before it
        first waits for any of them; `instructions` and `loop_instructions`. On AMD nothing is known of the loop:
        `in_flight` and `instructions` are the whole kernel's.
    """
    return _read_amd(binary) if target.backend == "hip" else _read_nvidia(binary)


def _read_nvidia(binary: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        listing = _output(TOOLS / "nvdisasm", "-c", file.name)
        usage = _output(TOOLS / "cuobjdump", "-res-usage", file.name)
    code = sass_lines(listing)
    loop = longest_loop(code)
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "spills": _count(code, r"\b(?:LDL|STL)\b"),
        "shared": binary.metadata.shared,
        "loads": _count(code, r"\bLDG\b"),
        "loads_128": _count(code, r"\bLDG\.\S*128"),
        "stores": _count(code, r"\bSTG\b"),
        "stores_128": _count(code, r"\bSTG\.\S*128"),
        "truncations": _count(code, r"\bF2F\S*\.RZ"),
        "nan_dropped": _count(binary.asm["ptx"].splitlines(), r"\b(?:max|min)\.f32"),
        "barriers": _count(code, r"\bBAR\b"),
        "loop_barriers": _count(loop, r"\bBAR\b"),
        "in_flight": 32 * bytes_before_first_use(loop or code),
        "instructions": len(code),
        "loop_instructions": len(loop),
    }


def sass_lines(listing: str) -> list[str]:
    """Return the instructions and labels of a disassembly."""
    lines = []
    for line in listing.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?;)", line)
        if label:
            lines.append(f"{label[1]}:")
        elif instruction:
            lines.append(instruction[1])
    return lines


def longest_loop(code: list[str]) -> list[str]:
    """Return the body of the loop with the most instructions that load, or nothing."""
    labels = {line[:-1]: index for index, line in enumerate(code) if line.endswith(":")}
    bodies = []
    for index, line in enumerate(code):
        branch = re.search(r"\bBRA\S*\s.*?\(?(\.L_x_\d+)", line)
        # The last instruction of every kernel is a branch to itself.
        if branch and labels.get(branch[1], index) < index - 1:
            bodies.append(code[labels[branch[1]] : index + 1])
    bodies = [body for body in bodies if _count(body, r"\bLDG\b")]
    return max(bodies, key=lambda body: (_count(body, r"\bLDG\b"), -len(body)), default=[])


_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def bytes_before_first_use(code: list[str]) -> int:
    """Return how many bytes a lane has asked for when an instruction first needs one of them."""
    awaited: set[int] = set()
    total = 0
    for line in code:
        load = re.search(r"\bLDG((?:\.\w+)*)\s+R(\d+)", line)
        if load:
            width = next((_WIDTHS[part] for part in load[1].split(".") if part in _WIDTHS), 4)
            total += width
            first = int(load[2])
            awaited.update(range(first, first + max(width // 4, 1)))
        elif any(int(register) in awaited for register in re.findall(r"\bR(\d+)\b", line)):
            # A write to a register that is awaited is a wait too; but registers that are zeroed for a predicated
            # load stand before it.
            break
    return total


def _read_amd(binary: Any) -> dict[str, int]:
    code = binary.asm["amdgcn"]
    lines = [line.strip() for line in code.splitlines()]
    width = {"": 4, "x2": 8, "x3": 12, "x4": 16}
    in_flight = 0
    for line in lines:
        load = re.match(r"(?:global|buffer)_load_(dword(?:x\d)?|ushort|short_d16\S*)", line)
        if load:
            in_flight += width.get(load[1].removeprefix("dword"), 2) if load[1].startswith("dword") else 2
        elif in_flight and re.match(r"s_waitcnt.*vmcnt", line):
            break
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", code),
        "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", code),
        "shared": binary.metadata.shared,
        "loads": _count(lines, r"^(?:global|buffer)_load"),
        "loads_128": _count(lines, r"^(?:global|buffer)_load_dwordx4"),
        "stores": _count(lines, r"^(?:global|buffer)_store"),
        "stores_128": _count(lines, r"^(?:global|buffer)_store_dwordx4"),
        "barriers": _count(lines, r"^s_barrier"),
        "in_flight": 64 * in_flight,
        "instructions": _count(lines, r"^[vs]_|^(?:global|buffer|ds)_"),
    }


def resident_warps(machine: Machine, figures: dict[str, int], warps: int) -> int:
    """Return how many warps of programs of `warps` warps one SM holds at once."""
    lanes = machine.target.warp_size
    per_warp = -(-figures["registers"] // 8) * 8 * lanes
    programs = min(machine.max_programs, machine.max_warps // warps, machine.registers // (per_warp * warps))
    if figures["shared"]:
        programs = min(programs, machine.shared // (figures["shared"] + 1024))
    return programs * warps


def _count(lines: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, pattern
    return int(found[1])


def _output(*command: Any) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def unique(launches: list[Launch]) -> list[Launch]:
    """Leave out launches that compile to the same code as an earlier one."""
    seen: dict[tuple[object, ...], Launch] = {}
    for launch in launches:
        key = (
            launch.kernel.__name__,
            tuple(argument is None for argument in launch.arguments),
            tuple(sorted((name, str(value)) for name, value in launch.options.items())),
        )
        seen.setdefault(key, launch)
    return list(seen.values())

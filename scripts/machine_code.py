"""Compiles Triton kernels for real GPUs without one, and reads off the machine code what it will do.

A launch is compiled as Triton would specialise it: launching functions run on tensors without storage, with the launch
itself replaced by a note of its arguments (`noted_launches`), and each note is built for a target (`build`).
"""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Kernels are either interpreted or compiled, settled at their import.
os.environ.pop("TRITON_INTERPRET", None)

import assembly
import torch
import triton
from assembly import Figures
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with the arguments that it would be launched with."""

    kernel: JITFunction
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """The kernel's."""
        return str(self.kernel.__name__)

    @property
    def given(self) -> dict[str, Any]:
        """The kernel's arguments by their names."""
        named = dict(zip(self.kernel.arg_names, self.arguments, strict=False))
        return named | {name: value for name, value in self.options.items() if name in self.kernel.arg_names}

    @property
    def programs(self) -> int:
        """How many programs the grid has."""
        return math.prod(self.grid)

    @property
    def warps(self) -> int:
        """Of a program."""
        return int(self.options.get("num_warps", 4))


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


@dataclass(frozen=True, slots=True)
class Specialisation:
    """What Triton compiles a launch as: launches with the same one are the same machine code."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Tells it from every other of a target."""
        of = (self.signature, self.constants, self.attributes, sorted(self.options.items()))
        return f"{self.kernel.__module__}.{self.kernel.__name__} {of}"


def specialise(launch: Launch) -> Specialisation:
    """Sort a launch's arguments into what Triton compiles in and what it leaves to run time."""
    kernel, given = launch.kernel, launch.given
    options = {name: value for name, value in launch.options.items() if name not in kernel.arg_names}
    constants: dict[str, Any] = {}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], Any] = {}
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
    return Specialisation(kernel, signature, constants, attributes, options)


def build(special: Specialisation, target: GPUTarget) -> Any:
    """Compile for a target."""
    source = ASTSource(special.kernel, special.signature, special.constants, special.attributes)
    return triton.compile(source, target=target, options=special.options)


def specialises_on(kernel: JITFunction, names: tuple[str, ...]) -> bool:
    """Whether a new value of one of these arguments may compile the kernel anew."""
    return not all(parameter.do_not_specialize for parameter in kernel.params if parameter.name in names)


def read(binary: Any, target: GPUTarget) -> Figures:
    """Read off a compiled kernel what it takes and does.

    Returns:
        `registers` and bytes of `stack` per lane; `spills`, instructions that spill or fetch; `shared`, bytes;
        `in_flight`, bytes that a warp asks for in its loop (or, without one, from its start) before it first waits for
        any of them; on NVIDIA `truncations`, casts to bfloat16 that do not round, and `nan_dropped`, maxima that take
        the number where the other side is NaN; and what `assembly.common_figures` does.
    """
    shared = {"shared": binary.metadata.shared}
    if target.backend == "hip":
        return assembly.read_gcn(binary.asm["amdgcn"]) | shared
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        listing = _output(TOOLS / "nvdisasm", "-c", file.name)
        usage = _output(TOOLS / "cuobjdump", "-res-usage", file.name)
    return assembly.read_sass(listing, usage, binary.asm["ptx"]) | shared


def _output(*command: Any) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout

"""Compile Triton kernels for real GPUs, without a GPU, and read figures from the machine code.

Launches are compiled as Triton would specialise them. Launching functions run on tensors without storage, and each
launch is replaced by a note of its arguments (`noted_launches`). Then each note is compiled for a target (`build`).
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

# Whether kernels are interpreted or compiled is decided when they are imported.
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
DTYPES |= {torch.int8: "i8", torch.uint8: "u8"}


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with the arguments of its launch."""

    kernel: JITFunction
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.kernel.__name__)

    @property
    def given(self) -> dict[str, Any]:
        """The kernel's arguments by name."""
        named = dict(zip(self.kernel.arg_names, self.arguments, strict=False))
        return named | {name: value for name, value in self.options.items() if name in self.kernel.arg_names}

    @property
    def programs(self) -> int:
        """The number of programs in the grid."""
        return math.prod(self.grid)

    @property
    def warps(self) -> int:
        """The number of warps per program."""
        return int(self.options.get("num_warps", 4))


def noted_launches(function: Callable[[], Any]) -> list[Launch]:
    """Run a launching function and return its launches, without executing them."""
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
    """The specialisation that Triton compiles for a launch. Equal specialisations give the same machine code."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """A string that is unique among the specialisations for a target."""
        of = (self.signature, self.constants, self.attributes, sorted(self.options.items()))
        return f"{self.kernel.__module__}.{self.kernel.__name__} {of}"


def specialise(launch: Launch) -> Specialisation:
    """Split a launch's arguments into compile-time constants and run-time arguments, as Triton does."""
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
    """Compile a specialisation for a target."""
    source = ASTSource(special.kernel, special.signature, special.constants, special.attributes)
    return triton.compile(source, target=target, options=special.options)


def specialises_on(kernel: JITFunction, names: tuple[str, ...]) -> bool:
    """Whether a new value of one of these arguments can trigger a new compilation."""
    return not all(parameter.do_not_specialize for parameter in kernel.params if parameter.name in names)


def read(binary: Any, target: GPUTarget) -> Figures:
    """Read the figures of a compiled kernel.

    Returns:
        `registers` and bytes of `stack` per lane. `spills`: instructions that spill or reload. `shared`: bytes of
        shared memory. `in_flight`: bytes that a warp requests in its loop (or from its start, if it has none) before it
        first waits for any of them. On NVIDIA, `truncations`: casts to bfloat16 that do not round, `nan_dropped`:
        maxima that return the number if the other operand is NaN, and `matrix_of_groups`: matrix instructions that four
        warps share. And the figures of `assembly.common_figures`.
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

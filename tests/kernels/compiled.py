"""Compiles the norm kernels without a GPU and reads figures off the machine code.

Run by hand, it prints the table of kernels/README.md: `python tests/kernels/compiled.py`. Run by `test_compiled.py`, it
prints JSON. It runs in a process of its own, since kernels are either interpreted or compiled, settled at import.

What is compiled is what would be launched: the launching functions run on CPU tensors with the launch itself replaced
by a note of its arguments.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastln_kernels import norm

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
N_ROWS = 1024
SUBSETS = [subset for subset in itertools.product((True, False), repeat=3) if any(subset)]

Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


def launches(n_cols: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """Every distinct launch of the forward and of the seven backwards, each with the subset that makes it."""
    noted: list[Launch] = []

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        noted.append((kernel, args, kwargs))

    JITFunction.run = note
    x, weight = torch.empty(N_ROWS, n_cols, dtype=dtype), torch.empty(n_cols)
    _, stats = norm.layer_norm_forward(x, weight, weight, 1e-5)
    wanted_by = ["forward"] * len(noted)
    for dx, dweight, dbias in SUBSETS:
        need_x = dx or dweight
        norm.layer_norm_backward(
            x,
            x if need_x else None,
            weight if dx else None,
            stats if need_x else None,
            need_dx=dx,
            need_dweight=dweight,
            need_dbias=dbias,
            grad_dtype=torch.float32,
        )
        names = [name for name, wanted in (("dx", dx), ("dγ", dweight), ("dβ", dbias)) if wanted]
        wanted_by += [" ".join(names)] * (len(noted) - len(wanted_by))
    seen = set()
    for name, (kernel, args, kwargs) in zip(wanted_by, noted, strict=True):
        key = (kernel.__name__, tuple(a is None for a in args), tuple(kwargs.items()))
        if key not in seen:
            seen.add(key)
            yield name, (kernel, args, kwargs)


def build(launch: Launch, target: GPUTarget) -> Any:
    """Compile one launch as Triton would specialise it."""
    kernel, args, kwargs = launch
    constants = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    signature, attributes = {}, {}
    for index, (name, value) in enumerate(itertools.zip_longest(kernel.arg_names, args)):
        if name in constants or value is None:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{DTYPES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if value % 16 == 0 and not kernel.params[index].do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def specialises_on_rows(kernel: JITFunction) -> bool:
    """Whether a new number of rows (or of partial sums) may compile the kernel anew."""
    return not all(p.do_not_specialize for p in kernel.params if p.name in ("n_rows", "n_partials"))


def read(binary: Any, target: GPUTarget) -> dict[str, int]:
    """Registers, spills and memory instructions of a compiled kernel."""
    if target.backend == "hip":
        code = binary.asm["amdgcn"]
        noted = {name: int(re.search(rf"\.{name}:\s+(\d+)", code)[1]) for name in ("vgpr_count", "vgpr_spill_count")}
        return {
            "registers": noted["vgpr_count"],
            "spills": noted["vgpr_spill_count"],
            "loads_128": len(re.findall(r"_load_dwordx4", code)),
            "stores_128": len(re.findall(r"_store_dwordx4", code)),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        code = _output(TOOLS / "nvdisasm", "-c", file.name)
        usage = _output(TOOLS / "cuobjdump", "-res-usage", file.name)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loads_128": len(re.findall(r"\bLDG\.\S*128", code)),
        "stores_128": len(re.findall(r"\bSTG\.\S*128", code)),
        "shared": binary.metadata.shared,
        "truncations": len(re.findall(r"\bF2F\S*\.RZ", code)),
    }


def _output(*command: Any) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def figures(targets: list[str], n_cols: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """One row per target and distinct launch."""
    return [
        {
            "target": target,
            "kernel": launch[0].__name__,
            "for": name,
            "specialises_on_rows": specialises_on_rows(launch[0]),
            **read(build(launch, TARGETS[target]), TARGETS[target]),
        }
        for name, launch in launches(n_cols, dtype)
        for target in targets
    ]


def main() -> None:
    """Print the figures, as a Markdown table or as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--dtype", choices=DTYPES.values(), default="bf16")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    dtype = next(dtype for dtype, name in DTYPES.items() if name == options.dtype)
    rows = figures(options.targets, options.width, dtype)
    if options.json:
        print(json.dumps(rows))
        return
    columns = ("target", "kernel", "for", "registers", "spills", "loads_128", "stores_128")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(str(row[column]) for column in columns) + " |")


if __name__ == "__main__":
    main()

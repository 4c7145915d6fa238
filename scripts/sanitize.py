"""Check every load and store of the kernels against its tensor's bounds with triton-viz's sanitizer; no GPU needed.

    make sanitize    # in a separate environment, .venv-sanitize

The launching functions run unchanged, with their own launch choices, on shapes whose rows and columns end inside a
tile. `strict_sanitizer.py` explains what is checked and how. First the script checks itself: it must report copies of
the kernels whose masks let through one column or one row too many. The exit status is 1 if it finds an access out of
bounds, if a broken copy passes, or if a kernel is never launched.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import pkgutil
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

# triton-viz has its own interpreter, and cannot trace kernels that are already interpreted.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import triton_viz  # type: ignore[import-not-found]
from strict_sanitizer import StrictSanitizer

PACKAGE = "fastln_kernels"
KERNELS = Path(__file__).parent.parent / "kernels"

ROWS = (1, 7, 33)
WIDTHS = (1, 3, 17, 384, 1000, 1152)
WIDE_ROWS, WIDE = 7, (12000, 33000)
"""Shapes of rows whose sums use a separate kernel, and of rows that no kernel holds in registers."""
INT8_WIDTHS = (1, 17, 192, WIDE[-1])
DTYPES = (torch.float32, torch.bfloat16)

BREAKS = {"column": (r"< (N_COLS|n_cols|tl\.minimum)\b", r"<= \1"), "row": (r"\brows < (n_\w+)", r"rows <= \1")}
"""Substitutions that make every mask let through one more column or row."""


@dataclass(frozen=True, slots=True)
class Options:
    """One way to call the norms.

    Attributes:
        dropout: Whether the prologue has dropout.
        residual: Whether it adds a residual and returns the sum; in the backward, whether the sum has a gradient.
        strided: Whether the row stride is larger than the row length.
        centre: Whether it is LayerNorm and not RMSNorm.
        normed: Whether the backward uses x_hat as its saved tensor.
    """

    dropout: bool
    residual: bool
    strided: bool
    centre: bool
    normed: bool


# Eight combinations in which any two options take all four pairs of values.
OPTIONS = [Options(a, b, c, a ^ b, b ^ c) for a, b, c in itertools.product((False, True), repeat=3)]
SUBSETS = [wanted for wanted in itertools.product((False, True), repeat=3) if any(wanted)]


@dataclass
class Tally:
    """A count of checks and findings.

    Attributes:
        launches: Launches by kernel.
        accesses: Checked loads and stores by kernel.
        findings: The places of accesses out of bounds, each with the first case that led there.
    """

    launches: Counter[str] = field(default_factory=Counter)
    accesses: Counter[str] = field(default_factory=Counter)
    findings: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, kernel: str, sanitizer: StrictSanitizer, case: str) -> None:
        """Add the results of one kernel's sanitizer in one case."""
        self.launches[kernel] += sanitizer.launches
        self.accesses[kernel] += sanitizer.accesses
        for record in sanitizer.records:
            at = record.user_code_tracebacks[-1]
            access = f"{record.op_type.name} of {record.tensor_name}"
            where = f"{Path(at.filename).name}:{at.lineno}, in {at.func_name}: {access}: {at.line_of_code.strip()}"
            self.findings.setdefault((kernel, where), case)


class Kernels:
    """The kernels of a copy of the package.

    Attributes:
        kernels: Every Triton function named `..._kernel`, by module and name.
    """

    def __init__(self, folder: Path) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
        importlib.invalidate_caches()
        with mock.patch.object(sys, "path", [str(folder), *sys.path]):
            package = importlib.import_module(PACKAGE)
            found = pkgutil.walk_packages(package.__path__, f"{PACKAGE}.")
            self._modules = [importlib.import_module(module.name) for module in found]
        self.kernels = {_where(kernel): kernel for _, _, kernel in self._uses()}

    def module(self, name: str) -> Any:
        """Return a module of the package, such as the one with a kernel's launching function."""
        return next(module for module in self._modules if module.__name__ == f"{PACKAGE}.{name}")

    def _uses(self) -> Iterator[tuple[ModuleType, str, triton.JITFunction]]:
        for module in self._modules:
            for name, value in vars(module).items():
                if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                    yield module, name, value

    @contextlib.contextmanager
    def sanitized(self, tally: Tally, case: str) -> Iterator[None]:
        """Check the launches inside the block, and add the results to the tally."""
        sanitizers = {name: StrictSanitizer() for name in self.kernels}
        with contextlib.ExitStack() as stack:
            for module, name, kernel in list(self._uses()):
                traced = triton_viz.trace(sanitizers[_where(kernel)])(kernel)
                stack.enter_context(mock.patch.object(module, name, traced))
            yield
        triton_viz.clear()
        for name, sanitizer in sanitizers.items():
            tally.add(name, sanitizer, case)


def check_norms(
    kernels: Kernels, tally: Tally, n_rows: int, n_cols: int, dtype: torch.dtype, options: Iterable[Options]
) -> None:
    """Run the norm under the sanitizer: the forward, and the backward for all subsets of the gradients."""
    reference = importlib.import_module(f"{PACKAGE}.reference")
    weight, bias = torch.empty(n_cols), torch.empty(n_cols)
    print(f"{n_rows} × {n_cols} {_name(dtype)}", file=sys.stderr)
    for option in options:

        def rows(strided: bool = option.strided) -> torch.Tensor:
            return torch.empty((n_rows, n_cols + 8 * strided), dtype=dtype)[:, :n_cols]

        kind = reference.NormKind(1e-6, centre=option.centre, offset=0.0 if option.centre else 1.0)
        prologue: dict[str, Any] = {"dropout": 0.1 if option.dropout else 0.0}
        prologue["seed"] = torch.zeros(1, dtype=torch.int64) if option.dropout else None
        case = f"{n_rows} × {n_cols} {_name(dtype)}, {option}"
        with kernels.sanitized(tally, f"forward, {case}"):
            request = reference.NormForward(
                rows(),
                weight,
                bias if option.centre else None,
                kind,
                residual=rows() if option.residual else None,
                want_stream=option.residual,
                want_normed=option.normed,
                **prologue,
            )
            kernels.module("norm").norm_forward(request)
        for need_dx, need_dweight, need_dbias in SUBSETS:
            need_normed = need_dx or need_dweight
            with kernels.sanitized(tally, f"backward {need_dx=} {need_dweight=} {need_dbias=}, {case}"):
                request = reference.NormBackward(
                    rows(),
                    rows() if need_normed else None,
                    weight,
                    torch.empty(n_rows) if need_normed else None,
                    kind,
                    saved_is_normed=option.normed,
                    dstream=rows() if option.residual and need_dx else None,
                    need_dx=need_dx,
                    need_dresidual=need_dx and option.residual,
                    need_dweight=need_dweight,
                    need_dbias=need_dbias,
                    **prologue,
                )
                kernels.module("norm").norm_backward(request)


def check_int8(kernels: Kernels, tally: Tally, n_rows: int, n_cols: int, dtype: torch.dtype, wide: bool) -> None:
    """Run the rounding to 8 bits, alone, by a norm and by activations, and both products under the sanitizer."""
    print(f"int8 {n_rows} × {n_cols} {_name(dtype)}", file=sys.stderr)
    int8, reference = kernels.module("int8"), importlib.import_module(f"{PACKAGE}.reference")
    rows = torch.empty((n_rows, n_cols + 8), dtype=dtype)[:, :n_cols]
    weight = torch.empty((n_cols + 1, n_cols), dtype=torch.int8)
    for turned in (False, True) if n_cols % 64 == 0 else (False,):
        with kernels.sanitized(tally, f"int8, {n_rows} × {n_cols} {_name(dtype)}, {turned=}"):
            x8 = int8.quantise(rows, torch.empty(n_cols), turned=turned)
            kind, norm = reference.NormKind(1e-6), kernels.module("norm")

            def rounding(factors: torch.Tensor | None = None, turned: bool = False) -> Any:
                return int8.rounding(rows, factors, turned=turned)[1]

            factors = torch.empty(n_cols)
            norm.norm_forward(reference.NormForward(rows, None, None, kind), rounding(turned=turned))
            request = reference.NormBackward(rows, rows, factors, torch.empty(n_rows), kind, need_dx=True)
            norm.norm_backward(request, rounding(factors))
            norm.norm_backward(request._replace(need_dweight=True, need_dbias=True), rounding(factors))
            activation = kernels.module("activation")
            activation.activation_forward(rows, "gelu", rounding(turned=turned))
            activation.gated_forward(rows, rows, "silu", rounding(turned=turned))
            activation.activation_backward(rows, rows, "gelu", rounding(factors))
            for need_dgate, need_dup in ((True, True), (False, True)):
                activation.gated_backward(
                    *(rows, rows, rows, "silu"),
                    need_dgate=need_dgate,
                    need_dup=need_dup,
                    round_dgate=rounding(factors) if need_dgate else None,
                    round_dup=rounding(factors),
                )
            if wide:
                continue
            weight8 = int8.Weight8(weight, torch.empty(n_cols + 1), turned, torch.empty(0), torch.empty(0))
            int8.linear(x8, weight8, torch.empty(n_cols + 1), dtype)
            dy8 = int8.quantise(torch.empty((n_rows, n_cols + 1), dtype=dtype), weight8.scale)
            int8.linear_backward(dy8, weight8, dtype)


def check_elementwise(kernels: Kernels, tally: Tally, n_rows: int, n_cols: int, dtype: torch.dtype) -> None:
    """Run dropout and the activations under the sanitizer, on contiguous tensors and on two halves of one tensor."""
    print(f"elementwise {n_rows} × {n_cols} {_name(dtype)}", file=sys.stderr)
    activation, seed = kernels.module("activation"), torch.zeros(1, dtype=torch.int64)
    for halves in (False, True):
        both = torch.empty((n_rows, 2 * n_cols), dtype=dtype)
        gate, up = both.chunk(2, -1) if halves else (torch.empty((n_rows, n_cols), dtype=dtype) for _ in range(2))
        dy = torch.empty((n_rows, n_cols), dtype=dtype)
        with kernels.sanitized(tally, f"elementwise, {n_rows} × {n_cols} {_name(dtype)}, {halves=}"):
            kernels.module("dropout").dropout(gate, 0.1, seed)
            activation.activation_forward(gate, "gelu")
            activation.activation_backward(dy, gate, "gelu")
            activation.gated_forward(gate, up, "silu")
            for need_dgate, need_dup in ((True, True), (True, False), (False, True)):
                activation.gated_backward(dy, gate, up, "silu", need_dgate=need_dgate, need_dup=need_dup)


def check_codes(kernels: Kernels, tally: Tally, n_rows: int, n_cols: int, dtype: torch.dtype) -> None:
    """Run what keeps codes under the sanitizer, alone and where results are rounded to 8 bits, too."""
    print(f"codes {n_rows} × {n_cols} {_name(dtype)}", file=sys.stderr)
    reference, codes = (importlib.import_module(f"{PACKAGE}.{name}") for name in ("reference", "reference_codes"))
    norm, activation, int8 = (kernels.module(name) for name in ("norm", "activation", "int8"))
    rows, weight = torch.empty((n_rows, n_cols), dtype=dtype), torch.empty(n_cols)
    kept, rstd = torch.empty((n_rows, n_cols), dtype=torch.int8), torch.empty(n_rows)
    scale = torch.empty(codes.scale_shape(rows.shape, 8))
    kind = reference.NormKind(1e-6)
    with kernels.sanitized(tally, f"codes, {n_rows} × {n_cols} {_name(dtype)}"):
        norm.norm_forward(reference.NormForward(rows, weight, weight, kind, want_codes=True))
        request = reference.NormBackward(rows, kept, weight, rstd, kind, saved_is_normed=True, scale=scale)
        for need_dx, need_dweight, need_dbias in SUBSETS:
            wanted = {"need_dx": need_dx, "need_dweight": need_dweight, "need_dbias": need_dbias}
            norm.norm_backward(request._replace(**wanted))
        norm.norm_again(reference.NormAgain(kept, weight, weight, rstd, kind, True, scale, dtype))
        for rounds in (False, True):
            rounding = int8.rounding(rows)[1] if rounds else None
            for bits in (8, 4, 2):
                of_slopes = torch.empty(codes.code_shape(rows.shape, bits), dtype=torch.uint8)
                activation.activation_forward(rows, "gelu", rounding, bits=bits)
                activation.activation_backward(rows, of_slopes, "gelu", rounding, bits=bits)
            for bits in (8, 4):
                activation.gated_forward(rows, rows, "silu", rounding, bits=bits)
                of_codes = torch.int8 if bits == 8 else torch.uint8
                pair = [torch.empty(codes.code_shape(rows.shape, bits), dtype=of_codes) for _ in range(2)]
                scales = [torch.empty(codes.scale_shape(rows.shape, bits)) for _ in range(2)]
                activation.gated_backward(
                    *(rows, codes.GatedCodes(*pair, *scales), None, "silu"),
                    need_dgate=True,
                    need_dup=True,
                    round_dgate=rounding,
                    round_dup=rounding,
                )


def _where(kernel: triton.JITFunction) -> str:
    """Return the kernel's module and name, because two modules may have kernels of the same name."""
    return f"{kernel.fn.__module__.removeprefix(f'{PACKAGE}.')}.{kernel.fn.__name__}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_check() -> list[str]:
    """Break the masks in copies of the kernels, and return a complaint for each broken kernel that passes."""
    complaints = []
    for what, (mask, broken_mask) in BREAKS.items():
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(KERNELS / PACKAGE, Path(folder) / PACKAGE)
            for path in Path(folder).rglob("*.py"):
                path.write_text(re.sub(mask, broken_mask, path.read_text()))
            broken, tally = Kernels(Path(folder)), Tally()
            for n_rows, n_cols in ((7, 17), (WIDE_ROWS, WIDE[-1])):
                check_norms(broken, tally, n_rows, n_cols, torch.float32, [OPTIONS[-1]])
            check_elementwise(broken, tally, 7, 17, torch.float32)
            check_codes(broken, tally, 7, 17, torch.float32)
            for n_cols, wide in ((17, False), (WIDE[-1], True)):
                check_int8(broken, tally, 7, n_cols, torch.float32, wide)
        # Shared helpers mask the columns. Kernels with several rows mask the rows themselves, or do not mask them.
        expected = {n for n, k in broken.kernels.items() if what == "column" or "rows <= n_" in k.src}
        reported = {kernel for kernel, _ in tally.findings}
        print(f"broken on purpose with one {what} too many: reported in {', '.join(sorted(reported)) or 'none'}")
        complaints += [f"{kernel} with one {what} too many was not reported" for kernel in sorted(expected - reported)]
    return complaints


def main() -> int:
    """Run from the command line."""
    began = time.perf_counter()
    complaints = check_check()
    kernels, tally = Kernels(KERNELS), Tally()
    turn = itertools.cycle(OPTIONS)  # in this order, every width gets all eight
    for dtype, n_cols, n_rows in itertools.product(DTYPES, WIDTHS, ROWS):
        check_norms(kernels, tally, n_rows, n_cols, dtype, itertools.islice(turn, 2))
    for dtype, n_cols, n_rows in itertools.product(DTYPES, WIDTHS, ROWS):
        check_elementwise(kernels, tally, n_rows, n_cols, dtype)
    for dtype, n_cols, n_rows in itertools.product(DTYPES, INT8_WIDTHS, ROWS):
        check_int8(kernels, tally, n_rows, n_cols, dtype, n_cols == WIDE[-1])
    for dtype, n_cols, n_rows in itertools.product(DTYPES, INT8_WIDTHS, ROWS):
        check_codes(kernels, tally, n_rows, n_cols, dtype)
    for n_cols, dtype in itertools.product(WIDE, DTYPES):
        check_norms(kernels, tally, WIDE_ROWS, n_cols, dtype, itertools.islice(turn, 4))
    print(f"checked all subsets of gradients in {' and '.join(map(_name, DTYPES))}; with, without dropout, residual,")
    print(
        f"  gaps between rows and mean: rows {ROWS} × columns {WIDTHS} and {WIDE_ROWS} × {WIDE}; dropout, activations;"
    )
    print(f"  rows in 8 bits and their products, codes: columns {INT8_WIDTHS}")
    for kernel in sorted(kernels.kernels):
        print(f"  {kernel}: {tally.accesses[kernel]} loads and stores in {tally.launches[kernel]} launches")
        if not tally.accesses[kernel]:
            complaints.append(f"{kernel} was never launched: add a case for it in {Path(__file__).name}")
    complaints += [f"{kernel}: {where}\n    at {case}" for (kernel, where), case in tally.findings.items()]
    print(f"{time.perf_counter() - began:.0f} s")
    for complaint in complaints:
        print(f"FAILED: {complaint}")
    if not complaints:
        print("no access out of bounds")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())

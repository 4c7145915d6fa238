"""The GPU report without a GPU: checks under Triton's interpreter, timing with a clock that is made up."""

import dataclasses
import importlib.util
import itertools
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch

from fastln_kernels import norm, reference

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_report.py"
SPEC = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
report = importlib.util.module_from_spec(SPEC)
sys.modules["gpu_report"] = report  # where dataclasses look their module up
SPEC.loader.exec_module(report)

CPU = torch.device("cpu")
FASTLN = report.load_fastln()[0]
EAGER = report.load_torch()[0]


def case(operation="layer_norm-forward", dtype="fp32", n_rows=19, n_cols=40):
    return report.Case(report.OPERATIONS[operation], n_rows, n_cols, dtype)


def checked(implementation, of):
    return report.check(implementation, of, report.make_inputs(of, CPU, seed=3))


def spoilt(result, factor):
    """fastln's kernels with one result scaled: `factor` is 1 where nothing is wrong."""

    def of(function):
        def call(*arguments, **options):
            outputs = function(*arguments, **options)
            wrong = getattr(outputs, result, None)
            return outputs if wrong is None else outputs._replace(**{result: wrong * factor})

        return call

    kernels = types.SimpleNamespace(norm_forward=of(norm.norm_forward), norm_backward=of(norm.norm_backward))
    return report.Implementation("spoilt", lambda operation, given: report.kernel_work(kernels, operation, given))


class FakeClock:
    """A replay takes the next of its durations, which the test chose."""

    def __init__(self, durations):
        self.durations = {name: itertools.cycle(own) for name, own in durations.items()}
        self.turns = []

    def __call__(self, replay):
        name = replay()
        self.turns.append(name)
        return next(self.durations[name])


def record_plainly(works, n_cycles):
    def replay():
        for work in list(works) * n_cycles:
            work.run()

    return replay


def bench(rounds=3, clock=None, l2_bytes=1 << 10):
    ticks = itertools.count(1)
    return report.Bench(CPU, l2_bytes, rounds, record_plainly, clock or (lambda replay: 1e-3 * next(ticks)))


@pytest.mark.parametrize("dtype", report.DTYPES)
@pytest.mark.parametrize("operation", report.OPERATIONS)
def test_fastln_passes_its_checks(operation, dtype):
    errors, bounds, fault = checked(FASTLN, case(operation, dtype))
    assert fault is None
    assert list(errors) == list(bounds) == list(report.OPERATIONS[operation].results)
    assert all(errors[name] <= bounds[name] for name in bounds)


@pytest.mark.parametrize("operation", report.OPERATIONS)
def test_torch_passes_its_checks_through_autograd(operation):
    assert checked(EAGER, case(operation))[2] is None


@pytest.mark.parametrize(
    ("operation", "result"),
    [
        ("layer_norm-forward", "y"),
        ("layer_norm-backward", "dx"),
        ("layer_norm-backward-parameters", "dbias"),
        ("rms_norm-backward", "dweight"),
        ("dropout_add_layer_norm-forward", "y"),
        ("dropout_add_layer_norm-backward", "dresidual"),
    ],
)
def test_a_wrong_result_is_caught(operation, result):
    assert checked(spoilt(result, 1.0), case(operation))[2] is None
    assert f"relative error of {result}" in checked(spoilt(result, 1.001), case(operation))[2]


def test_a_result_of_the_wrong_dtype_or_that_is_not_a_number_is_caught():
    def with_y(change):
        return report.Implementation(
            "x", lambda *of: report.Work(lambda: {"y": change(FASTLN.prepare(*of).run()["y"])})
        )

    assert "torch.float64" in checked(with_y(torch.Tensor.double), case())[2]
    errors, _, fault = checked(with_y(lambda y: y * math.nan), case())
    assert errors == {"y": None}
    assert "relative error of y nan" in fault


def test_wrong_dropout_is_caught():
    keep = torch.rand(200, 200, generator=torch.Generator().manual_seed(0)) >= 0.125
    assert report.dropout_fault(keep, 0.125) is None
    assert "keeps" in report.dropout_fault(torch.ones(200, 200), 0.125)

    def other_mask_in_backward(operation, given):
        work = report.kernel_work(norm, operation, given)
        other = reference.dropout_keep(*given.x.shape, operation.dropout, given.seed + 1)
        return dataclasses.replace(work, run=lambda: work.run() | {"dx": work.run()["dresidual"] * other})

    of = case("dropout_add_layer_norm-backward")
    implementation = report.Implementation("other mask", other_mask_in_backward)
    assert "relative error of dx" in checked(implementation, of)[2]


def test_bounds():
    u, bf16 = 2.0**-24, 2.0**-7 / math.sqrt(3)
    plain = case("layer_norm-backward", "fp32", n_rows=200)
    assert report.bounds_for(plain, 2) == pytest.approx({"dx": 4 * u, "dweight": 14 * u, "dbias": 14 * u})
    fused = case("dropout_add_layer_norm-forward", "bf16")
    assert report.bounds_for(fused, 0) == pytest.approx({"y": 4 * u + 2 * bf16, "stream": 4 * u + bf16})
    assert report.bounds_for(fused, 2) == pytest.approx({"y": 4 * u + 4 * bf16, "stream": 4 * u + 3 * bf16})
    assert report.storage_bound(torch.float16) == pytest.approx(2.0**-10 / (2 * math.sqrt(3)))


@pytest.mark.parametrize(
    ("operation", "tensors"),
    [
        ("layer_norm-forward", 2),
        ("layer_norm-backward", 3),
        ("layer_norm-backward-parameters", 2),
        ("layer_norm-backward-dx", 3),
        ("rms_norm-forward", 2),
        ("rms_norm-backward", 3),
        ("dropout_add_layer_norm-forward", 4),
        ("dropout_add_layer_norm-backward", 5),
    ],
)
def test_bytes_that_must_move(operation, tensors):
    assert report.moved_bytes(case(operation, "bf16", 10, 100)) == tensors * 2000
    assert report.moved_bytes(case(operation, "fp32", 10, 100)) == tensors * 4000


def test_bytes_of_dbias_alone_are_those_of_dy():
    of = dataclasses.replace(case(), operation=report.Operation("dbias", report.LAYER_NORM, ("dbias",)))
    assert report.moved_bytes(of) == 19 * 40 * 4


def test_copies_fill_the_cache_several_times():
    assert report.copies_for(100, 50) == 2
    assert report.copies_for(100, 100) == 4
    assert report.copies_for(99, 100) == 5
    assert report.copies_for(1 << 30, 50 << 20) == 2


def test_rows_make_64_mib():
    assert report.rows_for(1024, 2) == 32768
    assert report.rows_for(65536, 4) == 256
    assert report.rows_for(1 << 24, 2) == 16
    assert [of.n_rows for of in report.make_cases(["rms_norm-forward"], ["bf16", "fp32"], [768], None)] == [
        43690,
        21845,
    ]
    assert {of.n_rows for of in report.make_cases(report.OPERATIONS, ["fp16"], [8, 16], 7)} == {7}
    assert len(report.make_cases(report.OPERATIONS, report.DTYPES, report.WIDTHS, 1)) == 8 * 3 * 11


def test_implementations_take_turns_in_every_round():
    clock = FakeClock({"a": [1.0, 2.0], "b": [3.0], "c": [4.0]})
    replays = {name: lambda name=name: name for name in "abc"}
    seconds = report.interleave(replays, 4, clock)
    assert seconds == {"a": [1.0, 2.0, 1.0, 2.0], "b": [3.0] * 4, "c": [4.0] * 4}
    rounds = [tuple(clock.turns[i : i + 3]) for i in range(0, 12, 3)]
    assert all(sorted(turns) == ["a", "b", "c"] for turns in rounds)
    assert len(set(rounds)) > 1


def test_timing_is_a_median_beside_the_copy_of_the_same_round():
    timing = report.summarise([2.0, 4.0, 8.0], [1.0, 3.0, 4.0], n_bytes=10**9)
    assert (timing.low, timing.median, timing.high) == (3.0, 4.0, 6.0)
    assert timing.gb_per_s == 0.25
    assert timing.share_of_copy == 0.5


def test_a_case_is_checked_and_timed_per_call():
    def clock(replay):
        replay()
        return 1.0

    of = case("layer_norm-backward", "bf16", n_rows=4, n_cols=16)
    copy, own = report.measure_case(of, [FASTLN], bench(rounds=2, clock=clock, l2_bytes=300))
    assert (copy.implementation, own.implementation) == ("copy", "fastln")
    assert own.bytes == copy.bytes == 3 * 4 * 16 * 2
    assert own.n_copies == 4  # 4 x 300 bytes of cache, 384 bytes a call
    assert own.timing.seconds == [1 / 20] * 2
    assert own.timing.gb_per_s == pytest.approx(384 * 20 / 1e9)
    assert own.timing.share_of_copy == copy.timing.share_of_copy == 1.0
    assert own.errors["dx"] <= own.bounds["dx"]


def test_what_fails_its_check_or_raises_is_not_timed():
    def raises(operation, given):
        raise RuntimeError("64 KB a row at most\nand more")

    recorded = []

    def record(works, n_cycles):
        recorded.append(works)
        return record_plainly(works, n_cycles)

    implementations = [spoilt("y", 1.5), report.Implementation("raises", raises), FASTLN]
    setting = dataclasses.replace(bench(), record=record)
    _, wrong, raising, right = report.measure_case(case(n_rows=3, n_cols=16), implementations, setting)
    assert len(recorded) == 2  # the copy and fastln
    assert wrong.timing is None
    assert wrong.errors["y"] > 0.3
    assert "relative error of y" in wrong.error
    assert raising.timing is None
    assert raising.error == "RuntimeError; 64 KB a row at most"
    assert right.error is None
    assert right.timing is not None
    text = report.table([wrong, raising, right])
    assert "| spoilt | – | – | – | not timed: relative error of y" in text
    assert "| raises | – | – | – | not timed: RuntimeError; 64 KB a row at most |" in text


def test_table():
    row = report.Row("layer_norm-backward-dx", "peer", "bf16", 7, 768, "computes dweight and dbias too", 100, 2)
    row.timing = report.Timing([], 20e-6, 19.5e-6, 21e-6, 1234.4, 0.874)
    assert report.table([row]).splitlines() == [
        "| operation | dtype | rows × columns | implementation | µs, median (quartiles) | GB/s | of copy | note |",
        "|---|---|---|---|---|---|---|---|",
        "| layer_norm-backward-dx | bf16 | 7 × 768 | peer | 20.0 (19.5–21.0) | 1234 | 87% | "
        "computes dweight and dbias too |",
    ]


def test_json_round_trip(tmp_path):
    rows = report.measure_case(case(n_rows=3, n_cols=16), [FASTLN, spoilt("y", math.nan)], bench())
    path = tmp_path / "new" / "gpu.json"
    report.save(path, {"commit": "abc"}, {"peer": "not installed"}, rows)
    found = json.loads(path.read_text())
    assert (found["provenance"], found["missing"]) == ({"commit": "abc"}, {"peer": "not installed"})
    again = [
        report.Row(**row | {"timing": None if row["timing"] is None else report.Timing(**row["timing"])})
        for row in found["rows"]
    ]
    assert again == rows


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "results" / "gpu.json"
    assert report.main(["--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "no CUDA GPU here: nothing was measured\n"
    assert captured.err == ""
    assert not out.parent.exists()


@pytest.mark.parametrize("option", [["--widths", "0"], ["--rounds", "1"], ["--rows", "x"], ["--dtypes", "int8"]])
def test_bad_options_are_refused(option, tmp_path):
    with pytest.raises(SystemExit) as refusal:
        report.main(["--out", str(tmp_path / "gpu.json"), *option])
    assert refusal.value.code == 2


@pytest.mark.parametrize(("name", "package"), [("liger", "liger_kernel"), ("flash-attn", "flash_attn")])
def test_a_missing_peer_says_so(monkeypatch, name, package):
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    implementation, reason = report.LOADERS[name]()
    assert implementation is None
    assert reason.startswith("not installed (")


def pretend(monkeypatch, name, **members):
    """Put a module into the import system, and the packages it is in."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    vars(sys.modules[name]).update(members)


class InPlaceRMSNorm(torch.autograd.Function):
    """Stands in for Liger's: its dx lies where dy was."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset, casting_mode):
        assert (offset, casting_mode) == (0.0, "gemma")
        y, _, _, rstd = reference.norm_forward(x, weight, None, report.NormKind(eps, centre=False))
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        kind = report.NormKind(1e-6, centre=False)
        need = {"need_dx": True, "need_dweight": True}
        gradients = reference.norm_backward(dy, *ctx.saved_tensors, kind, **need)
        return dy.copy_(gradients.dx), gradients.dweight, None, None, None


class PlainLayerNorm:
    """Stands in for Liger's."""

    @staticmethod
    def apply(x, weight, bias, eps):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


@pytest.mark.parametrize("operation", report.OPERATIONS)
def test_liger_is_called_as_it_wants(monkeypatch, operation):
    pretend(
        monkeypatch,
        "liger_kernel.ops",
        LigerLayerNormFunction=PlainLayerNorm,
        LigerRMSNormFunction=InPlaceRMSNorm,
    )
    implementation, _ = report.load_liger()
    of = case(operation)
    given = report.make_inputs(of, CPU, seed=3)
    dy = given.dy.clone()
    assert report.check(implementation, of, given)[2] is None
    assert torch.equal(given.dy, dy)


@pytest.mark.parametrize("operation", report.OPERATIONS)
def test_flash_attention_is_called_as_it_wants(monkeypatch, operation):
    def layer_norm_fn(x, weight, bias, residual=None, eps=1e-6, dropout_p=0.0, prenorm=False, is_rms_norm=False):
        if dropout_p:
            x = torch.nn.functional.dropout(x, dropout_p)
        stream = x if residual is None else x + residual
        if is_rms_norm:
            y = torch.nn.functional.rms_norm(stream, x.shape[-1:], weight, eps)
        else:
            y = torch.nn.functional.layer_norm(stream, x.shape[-1:], weight, bias, eps)
        return (y, stream) if prenorm else y

    pretend(monkeypatch, "flash_attn.ops.triton.layer_norm", layer_norm_fn=layer_norm_fn)
    implementation, _ = report.load_flash()
    assert checked(implementation, case(operation))[2] is None


def test_what_peers_do_otherwise_is_said(monkeypatch):
    pretend(monkeypatch, "liger_kernel.ops")
    pretend(monkeypatch, "flash_attn.ops.triton.layer_norm")
    liger, flash = report.load_liger()[0], report.load_flash()[0]

    def note(implementation, operation):
        return implementation.note(report.OPERATIONS[operation])

    assert note(FASTLN, "layer_norm-backward-parameters") == ""
    assert note(EAGER, "dropout_add_layer_norm-forward") == "dropout, sum and norm apart"
    assert note(liger, "layer_norm-backward-parameters") == "computes dx too"
    assert note(liger, "layer_norm-backward-dx") == ""
    assert note(liger, "rms_norm-backward") == "writes dx over dy"
    assert note(liger, "dropout_add_layer_norm-backward") == "dropout and sum by torch, apart"
    assert note(flash, "layer_norm-backward-dx") == "computes dweight and dbias too"
    assert note(flash, "layer_norm-forward") == ""
    assert note(flash, "rms_norm-backward") == ""


def test_torch_compile_compiles_once_a_case(monkeypatch):
    import torch._functorch.config as config

    compiled = []
    monkeypatch.setattr(config, "donated_buffer", config.donated_buffer)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append(function) or function)
    implementation, _ = report.load_compile()
    assert not config.donated_buffer
    for n_cols in (40, 24):
        assert checked(implementation, case("dropout_add_layer_norm-backward", n_cols=n_cols))[2] is None
    assert len(compiled) == 2

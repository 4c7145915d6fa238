"""The command line as a person meets it: one line of error, exit status 2, no traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image
from transformers import BertConfig

from fastln import cli, doctor
from fastln.data.loading import READERS
from fastln.machine import MemoryLimit
from fastln.ops.backends import OPERATIONS, resolve
from fastln.standins.tricks import TRICKS
from fastln_kernels.cpu import library, products, units


def fastln(*arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastln", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out", "{tmp}/o", "--method", "layernrm"], "did you mean 'layernorm'"),
        (["train", "--out", "{tmp}/o", "--method", "lora", "--engine", "torch"], "(valid: peft, fastln)"),
        (["train", "--out", "{tmp}/o", "--data", "{tmp}/nowhere"], "nowhere"),
        (["train", "--out", "{tmp}/o", "--without", "late_row"], "unknown name 'late_row' in `without`; did you mean"),
        (["train", "--out", "{tmp}/o", "--without", "cache", "--engine", "torch"], "without cache is for engine 'fas"),
        (
            ["train", "--out", "{tmp}/o", "--products", "int"],
            "unknown products 'int' (did you mean 'int8'?); valid: exa",
        ),
        (["train", "--out", "{tmp}/o", "--activations", "exat"], "unknown activations 'exat' (did you mean 'exact'?)"),
        (["train", "--out", "{tmp}/o", "--products", "int8", "--engine", "peft"], "products 'int8' is for engine 'fas"),
        (["train", "--out", "{tmp}/o", "--model", "{tmp}"], "there is no config.json"),
        (["train", "--out", "{tmp}/o", "--dtype", "float8"], "unknown dtype 'float8' (valid: auto, float32"),
        (["train", "--out", "{tmp}/o", "--feature-cache", "{tmp}/c"], "a vision tower that is frozen, and method"),
        (
            ["train", "--out", "{tmp}/o", "--feature-cache", "{tmp}/c", "--feature-cache-size", "x"],
            "'x' is not a valid size",
        ),
        (["eval", "{tmp}/nowhere"], "nowhere"),
        (
            ["eval", "dual", "--split", "tset"],
            "no split 'tset'; the splits are train, validation, test; did you mean 'test'?",
        ),
        (["eval", "dual", "--split", "validation"], "phantom (synthetic) has no validation split, only train, test"),
        (["eval", "dual", "--data", "{tmp}", "--layout", "slak"], "did you mean 'slake'?"),
        (["train", "--out", "{tmp}/o", "--language", "zh"], "phantom: no language 'zh' to choose: it has one"),
        (["eval", "dual", "--predictions", "{tmp}"], "is a folder"),
        (["eval", "dual", "--image-size", "100"], "it must be a multiple of 16, because images are cut into patches"),
        (["train", "--out", "{tmp}/o", "--image-size", "0"], "image size 0: it must be a multiple of 16"),
        (["eval", "{tmp}/binary"], "config.json: cannot be read"),
        (["merge", "{tmp}", "--base", "{tmp}", "--out", "{tmp}/o"], "there is no config.json"),
        (["merge", "{tmp}", "--base", "{tmp}", "--out", "{tmp}/full"], "full: is there already"),
        (["bench", "--suite", "qick"], "did you mean 'quick'"),
        (["bench", "--method", "layernorm/pft"], "layernorm/peft"),
        (["bench", "--products", "int"], "did you mean 'int8'"),
        (["bench", "--out", "{tmp}/full"], "already"),
    ],
)
def test_a_users_error_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results.json").write_text("[]")
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "config.json").write_bytes(b"\xff\xfe{")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    code, output = fastln(*arguments, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    line = output.err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in output.err
    assert not (tmp_path / "o").exists(), "an error leaves nothing behind"


QUESTION = {"qid": 1, "image_name": "a.png", "question": "Is it?", "answer": "yes", "answer_type": "CLOSED"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "trainset.json: row 1 (qid 2): field 'answer' must be a text, not null"),
        ({"image_name": "gone.png"}, 'trainset.json: row 1 (qid 2): image "gone.png" is missing in'),
        ({"image_name": "../a.png"}, 'trainset.json: row 1 (qid 2): image "../a.png" leads outside the folder'),
        ({"image_name": "text.png"}, "text.png: this is not an image of a known format"),
        ("[{]", "trainset.json: line 1, column 3: not valid JSON"),
        ("[]", "the train split holds no usable row"),
    ],
)
def test_bad_data_is_told_with_its_file_and_row(change, message, tmp_path, monkeypatch, capsys):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "images").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "text.png").write_text("no image")
    rows = change if isinstance(change, str) else json.dumps([QUESTION, QUESTION | {"qid": 2} | change])
    (tmp_path / "trainset.json").write_text(rows)
    (tmp_path / "testset.json").write_text(json.dumps([QUESTION | {"qid": 3, "question": "Is it not?"}]))
    train = ["train", "--out", tmp_path / "o", "--data", tmp_path, "--method", "head"]
    bench = [
        "bench",
        "--out",
        tmp_path / "b",
        "--data",
        tmp_path,
        "--model",
        "dual",
        "--method",
        "head/torch",
        "--batch-size",
        "1",
    ]
    for arguments in (train, bench):
        code, output = fastln(*arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2
        assert message in output.err
        assert output.err.count("error: ") == 1
        assert "Traceback" not in output.err


def test_a_folder_that_holds_a_run_is_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.json").write_text('{"finished": true}')
    code, output = fastln("train", "--out", tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert output.err.strip().splitlines()[-1].startswith(f"error: {tmp_path}: already holds a run; give another")
    assert (tmp_path / "run.json").read_text() == '{"finished": true}'


def test_an_option_of_the_wrong_kind_is_status_2(monkeypatch, capsys):
    code, output = fastln("train", "--out", "x", "--epochs", "many", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert "--epochs" in output.err


def test_the_help_names_every_option_whole_in_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("train", "eval", "merge", "bench"):
        status, printed = fastln(command, "--help", monkeypatch=monkeypatch, capsys=capsys)
        assert status == 0
        for option in typer.main.get_command(cli.app).commands[command].params:
            assert all(name in printed.out.split() for name in option.opts if name.startswith("--")), option.opts
    assert fastln("--help", monkeypatch=monkeypatch, capsys=capsys)[1].out.count("...") == 1  # its usage


@pytest.mark.parametrize("command", ["train", "eval", "bench"])
def test_the_help_names_every_layout(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    status, printed = fastln(command, "--help", monkeypatch=monkeypatch, capsys=capsys)
    assert status == 0
    text = " ".join(printed.out.split()).replace("- ", "-")  # lines break after hyphens too
    assert f"laid out: {', '.join(READERS)}; recognised" in text


def test_doctor_names_a_backend_and_a_reason_for_each_operation(monkeypatch, capsys):
    code, output = fastln("doctor", "--json", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    findings = json.loads(output.out)
    assert set(findings["operations"]) == set(OPERATIONS)
    assert all(choice["backend"] and choice["reason"] for choice in findings["operations"].values())
    assert findings["packages"]["torch"]
    assert findings["plan"] is None
    code, output = fastln("doctor", monkeypatch=monkeypatch, capsys=capsys)
    assert "layer_norm" in output.out
    assert findings["machine"]["cpu"] in output.out


def test_doctor_lists_what_prepare_may_change_with_gain_and_risk(monkeypatch, capsys):
    _, output = fastln("doctor", monkeypatch=monkeypatch, capsys=capsys)
    block = output.out.partition("what prepare() may change (leave out with without=(...))\n")[2].splitlines()
    names = [line.split()[0] for line in block if line.startswith("  ")]
    assert names == list(TRICKS)
    for name, line in zip(names, block, strict=True):
        assert TRICKS[name].gains in line
        assert f"(risk: {TRICKS[name].risk})" in line


def test_doctor_takes_the_products_of_a_plan(monkeypatch, capsys):
    words = ("doctor", "BertForMaskedLM:8x128", "--products")
    code, printed = fastln(*words, "int8", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert "products int8" in printed.out
    code, printed = fastln(*words, "int", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert printed.err.splitlines()[-1].startswith("error: unknown products 'int' (did you mean 'int8'?); valid: exact")
    code, printed = fastln("doctor", "--products", "int8", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert "products 'int8' are for the plan of a model" in printed.err


def test_doctor_says_in_one_line_what_is_slower(monkeypatch):
    lacks = library.why_not("norm") or products.why_not("attention")
    assert doctor.render(doctor.examine()).count("\n  slower ") == (lacks is not None)
    monkeypatch.setattr(library, "why_not", lambda name: "no C++ compiler")
    monkeypatch.setattr(doctor, "cpu_flags", lambda: {"sse2"})
    (line,) = [line for line in doctor.render(doctor.examine()).splitlines() if line.startswith("  slower ")]
    assert "every operation runs without compiled kernels (no C++ compiler)" in line
    assert "vectors of 128 bits" in line


@pytest.fixture
def forgetful():
    """What was decided about backends holds for this test alone."""
    resolve.cache_clear()
    yield
    resolve.cache_clear()


@pytest.mark.usefixtures("forgetful")
@pytest.mark.skipif(library.why_not("attention") is not None, reason=f"{library.why_not('attention')}")
def test_doctor_says_where_torch_lacks_the_products_of_blocks(monkeypatch):
    monkeypatch.setattr(products, "why_not", lambda name: "torch 9.9 exports no products of blocks")
    lines = doctor.render(doctor.examine()).splitlines()
    told = [line.split()[0] for line in lines if "torch 9.9 exports no products of blocks" in line]
    assert told == ["slower", "attention", "int8_linear", "linear"]


@pytest.mark.parametrize(
    ("rates", "forced", "lines", "verdict"),
    [
        (
            {"float32": 187e9, "bfloat16": 106e9, "int8": 700e9},
            "",
            ["187 GFLOP/s float32 rows, bfloat16 rows (the faster)", "106 GFLOP/s -", "700 GFLOP/s 8-bit products"],
            "pays here: 8-bit units are 3.7 times as fast as float32's",
        ),
        (
            {"float32": 187e9, "bfloat16": 1400e9, "int8": 1600e9},
            "float32",
            [
                "187 GFLOP/s float32 rows, bfloat16 rows (by FASTLN_CPU_UNIT)",
                "1,400 GFLOP/s -",
                "1,600 GFLOP/s 8-bit products",
            ],
            "pays here: 8-bit units are 8.6 times as fast as float32's",
        ),
        (
            {"float32": 115e9, "bfloat16": 219e9, "int8": 400e9},
            "",
            ["115 GFLOP/s float32 rows", "219 GFLOP/s bfloat16 rows (the faster)", "400 GFLOP/s 8-bit products"],
            "pays here for rows in float32: 8-bit units are 3.5 times as fast as theirs; it may not for bfloat16 "
            "(1.8 times)",
        ),
        (
            {"float32": 200e9, "bfloat16": 230e9, "int8": 400e9},
            "",
            ["200 GFLOP/s float32 rows", "230 GFLOP/s bfloat16 rows (the faster)", "400 GFLOP/s 8-bit products"],
            "may not pay here, but for a byte a weight: 8-bit units are only 2.0 times as fast as float32's and 1.7 "
            "times as fast as bfloat16's, not 2.5 times",
        ),
        (
            {"float32": 115e9, "bfloat16": 219e9},
            "",
            [
                "115 GFLOP/s float32 rows",
                "219 GFLOP/s bfloat16 rows (the faster)",
                "none no 8-bit products: they need AVX-512 VNNI or AMX",
            ],
            None,
        ),
        (
            {"float32": 60e9},
            "",
            [
                "60 GFLOP/s float32 rows, bfloat16 rows (there are no others)",
                "none -",
                "none no 8-bit products: they need AVX-512 VNNI or AMX",
            ],
            None,
        ),
    ],
)
@pytest.mark.skipif(products.why_not("linear") is not None, reason=f"{products.why_not('linear')}")
def test_doctor_says_which_unit_serves_what_and_whether_8_bits_pay(rates, forced, lines, verdict, monkeypatch):
    monkeypatch.setattr(units, "rates", lambda: rates)
    monkeypatch.setattr(units, "linear_rates", lambda _: {"fastln": 110.1e9, "torch": 100e9})
    monkeypatch.setenv(units.VARIABLE, forced)
    units._for_bfloat16.cache_clear()
    try:
        told = doctor.render(doctor.examine()).splitlines()
    finally:
        units._for_bfloat16.cache_clear()
    start = told.index("units that multiply blocks on this CPU, measured on one thread")
    want = [f"{name} {line}" for name, line in zip(("float32", "bfloat16", "int8"), lines, strict=True)]
    assert [" ".join(line.split()) for line in told[start + 1 : start + 4]] == want
    verdicts = [line for line in told if line.startswith("  products='int8' ")]
    assert verdicts == ([] if verdict is None else [f"  products='int8' {verdict}"])


@pytest.mark.skipif(products.why_not("linear") is not None, reason=f"{products.why_not('linear')}")
def test_doctor_says_where_torch_multiplies_float32_rows(monkeypatch):
    monkeypatch.setattr(units, "rates", lambda: {"float32": 187e9, "bfloat16": 300e9})
    monkeypatch.setattr(units, "linear_rates", lambda _: {"fastln": 148e9, "torch": 163e9})
    monkeypatch.setattr(units, "compute_dtype", lambda dtype, **_: dtype)
    told = doctor.examine()["units"]
    assert told["float32"]["serves"] == (
        "float32 rows of attention (linear layers run on torch's own products: 163 GFLOP/s, not 148)"
    )


def test_doctor_lists_the_vectors_that_8_bits_need(monkeypatch):
    monkeypatch.setattr(doctor, "cpu_flags", lambda: {"avx2", "avx512_vnni", "amx_int8", "fpu"})
    assert "\n  vectors          avx2 avx512_vnni amx_int8\n" in doctor.render(doctor.examine())


def test_doctor_says_what_becomes_of_freed_memory(monkeypatch):
    def line():
        lines = doctor.render(doctor.examine()).splitlines()
        return next(line for line in lines if line.startswith("  freed memory "))

    monkeypatch.setattr(doctor, "why_no_arena", lambda device: None)
    monkeypatch.setattr(doctor, "arena_limit", lambda: MemoryLimit(3 << 30, "the cgroup's limit"))
    assert "prepare() keeps that of large tensors for the next step, up to 3.0 GiB (the cgroup's limit); " in line()
    monkeypatch.setattr(doctor, "why_no_arena", lambda device: "no C++ compiler")
    assert line().endswith("torch's allocator decides (no C++ compiler)")


def test_doctor_tells_the_limit_of_a_container(monkeypatch):
    monkeypatch.setattr(doctor, "memory_limit", lambda: MemoryLimit(1 << 29, "the cgroup's limit"))
    assert "GiB, of which 0.5 GiB may be used (the cgroup's limit)" in doctor.render(doctor.examine())


def test_doctor_does_not_install_the_arena_and_transformers_imports_from_the_repository_root():
    """transformers looks for a package called `kernels`; the folder of that name must not pass for it."""
    program = """
import torch, transformers.integrations
from fastln import doctor
from fastln_kernels.cpu import memory
doctor.render(doctor.examine("BertForMaskedLM:8x128:1"))
assert memory.users() == 0
first, second = (torch.empty(1 << 20, dtype=torch.uint8) for _ in range(2))
assert abs(first.data_ptr() - second.data_ptr()) != 1 << 20  # glibc's blocks have a header between them
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


@pytest.fixture
def bert(tmp_path):
    """The configuration of a tiny BERT, without weights."""
    config = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config.architectures = ["BertForMaskedLM"]
    config.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize("source", ["{bert}", "{bert}/config.json", "BertForMaskedLM:8x128:2"])
def test_doctor_shows_the_plan_of_a_model_of_which_it_reads_no_weights(source, bert, monkeypatch, capsys):
    code, output = fastln("doctor", source.format(bert=bert), monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    head, *plan = output.out.partition("what prepare() would do with this model\n")[2].splitlines()
    assert head.startswith("  BertForMaskedLM, method layernorm: ")
    assert any("LayerNorm" in line for line in plan)
    code, output = fastln("doctor", source.format(bert=bert), "--json", monkeypatch=monkeypatch, capsys=capsys)
    assert json.loads(output.out)["plan"] == [line.removeprefix("  ") for line in (head, *plan)]


def test_doctor_names_what_is_wrong_with_a_model(bert, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    config = json.loads((bert / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"architectures": ["BertForPoetry"]}))
    for source, message in (
        (f"chat:{tmp_path}/nowhere", "nowhere: no such directory"),
        (tmp_path / "nowhere", "nowhere: no such directory"),
        (tmp_path / "empty", "there is no config.json in this directory"),
        (tmp_path / "other", "names the class 'BertForPoetry', which transformers does not have"),
        ("BertForMaskedLN:8x128", "did you mean 'BertForMaskedLM'?"),
        ("dual", "model 'dual': the size of its head depends on the data, so there is no plan without: give one"),
    ):
        code, output = fastln("doctor", source, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2
        assert message in output.err.strip().splitlines()[-1]

"""The command line as a person meets it: one line of error, exit status 2, no traceback."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from fastln import cli, doctor
from fastln.ops.backends import OPERATIONS
from fastln_kernels.cpu import library


def fastln(*arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastln", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out", "{tmp}/o", "--method", "layernrm"], "did you mean 'layernorm'"),
        (["train", "--out", "{tmp}/o", "--method", "lora", "--engine", "torch"], "(valid: peft)"),
        (["train", "--out", "{tmp}/o", "--data", "{tmp}/nowhere"], "nowhere"),
        (["train", "--out", "{tmp}/o", "--model", "{tmp}"], "there is no config.json"),
        (["train", "--out", "{tmp}/o", "--dtype", "float8"], "unknown dtype 'float8' (valid: auto, float32"),
        (["train", "--out", "{tmp}/o", "--feature-cache", "{tmp}/c"], "a vision tower that is frozen, and method"),
        (
            ["train", "--out", "{tmp}/o", "--feature-cache", "{tmp}/c", "--feature-cache-size", "x"],
            "'x' is no number of",
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
        (["eval", "dual", "--image-size", "100"], "it must be a multiple of 16, for images are cut into patches"),
        (["train", "--out", "{tmp}/o", "--image-size", "0"], "image size 0: it must be a multiple of 16"),
        (["eval", "{tmp}/binary"], "config.json: cannot be read"),
        (["merge", "{tmp}", "--base", "{tmp}", "--out", "{tmp}/o"], "there is no config.json"),
        (["merge", "{tmp}", "--base", "{tmp}", "--out", "{tmp}/full"], "full: is there already"),
        (["bench", "--suite", "qick"], "did you mean 'quick'"),
        (["bench", "--method", "layernorm/pft"], "layernorm/peft"),
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
        ({"image_name": "text.png"}, "text.png: this is no image of a known format"),
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


def test_doctor_names_a_backend_and_a_reason_for_each_operation(monkeypatch, capsys):
    code, output = fastln("doctor", "--json", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    findings = json.loads(output.out)
    assert set(findings["operations"]) == set(OPERATIONS)
    assert all(choice["backend"] and choice["reason"] for choice in findings["operations"].values())
    assert findings["packages"]["torch"]
    code, output = fastln("doctor", monkeypatch=monkeypatch, capsys=capsys)
    assert "layer_norm" in output.out
    assert findings["machine"]["cpu"] in output.out


def test_doctor_says_in_one_line_what_is_slower(monkeypatch):
    assert doctor.render(doctor.examine()).count("\n  slower ") == (library.why_not("norm") is not None)
    monkeypatch.setattr(library, "why_not", lambda name: "no C++ compiler")
    monkeypatch.setattr(doctor, "cpu_flags", lambda: {"sse2"})
    (line,) = [line for line in doctor.render(doctor.examine()).splitlines() if line.startswith("  slower ")]
    assert "every operation runs without compiled kernels (no C++ compiler)" in line
    assert "vectors of 128 bits" in line


def test_transformers_imports_from_the_repository_root():
    """transformers looks for a package called `kernels`; the folder of that name must not pass for it."""
    subprocess.run([sys.executable, "-c", "import transformers, transformers.integrations"], check=True)

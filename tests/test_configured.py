"""Options from a YAML file and key=value words: what overrides what, and what is rejected."""

import re
import sys
from dataclasses import asdict

import pytest
import typer
import yaml

from fastln import FastLNError, cli
from fastln.configured import _with_values, expand
from fastln.data import DataOptions
from fastln.training import TrainConfig

COMMANDS = typer.main.get_command(cli.app).commands
TRAIN = COMMANDS["train"]


def fastln(*arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastln", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr()


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_words_overrule_the_file_and_options_both(config, monkeypatch, capsys):
    path = config("out: there\nepochs: 5\nbatch-size: 7\nlearning_rate: 1e-3\nresume: true\nseed: 3\nmodel: blip\n")
    words = [
        "epochs=6",
        "seed=null",
        "resume=false",
        "batch_size=8",
        "--batch-size",
        "9",
        "--data",
        "a=b",
        "dtype=float32",
    ]
    code, output = fastln("train", "--config", path, "--print-config", *words, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    values = yaml.safe_load(output.out)
    given = {"out": "there", "epochs": 6, "batch_size": 9, "learning_rate": 1e-3, "model": "blip", "data": "a=b"}
    assert given.items() <= values.items()
    assert {"resume": False, "seed": 0, "method": "layernorm"}.items() <= values.items()


def test_lists_take_each_others_place(config, monkeypatch, capsys):
    path = config("scope: [vision, text]")
    for words, scope in (
        ([], ["vision", "text"]),
        (["scope=[decoder]"], ["decoder"]),
        (["scope=decoder"], ["decoder"]),
        (["--scope", "projector"], ["projector"]),
    ):
        _, output = fastln("train", "--config", path, "--print-config", *words, monkeypatch=monkeypatch, capsys=capsys)
        assert yaml.safe_load(output.out)["scope"] == scope


def test_every_setting_of_a_training_is_an_option_with_the_same_default(monkeypatch, capsys):
    _, output = fastln("train", "--print-config", monkeypatch=monkeypatch, capsys=capsys)
    values = yaml.safe_load(output.out)
    lists = ("scope", "without")  # options that are given several times; None where none is given
    assert all(values.pop(name) == [] for name in lists)
    settings = {name: value for name, value in asdict(TrainConfig()).items() if name not in lists}
    assert {name: values.get(name, "missing") for name in settings} == settings


@pytest.mark.parametrize(
    ("words", "engine", "rates"),
    [
        ([], "fastln", ("0.003", "0.003", "0.001")),
        (["method=lora"], "peft", ("0.0005", "0.0005", "0.001")),
        (["method=layernorm+lora"], "fastln", ("0.0005", "0.003", "0.001")),
        (["method=LN-F-T", "engine=torch"], None, ("5e-05", "0.003", "0.001")),
        (["method=LN-F-T", "learning_rate=0.5"], "fastln", (None, "0.5", "0.5")),
        (["method=head", "learning_rate=0.5"], "fastln", (None, "0.5", "0.5")),
    ],
)
def test_defaults_that_the_method_brings_are_told(words, engine, rates, monkeypatch, capsys):
    _, output = fastln("train", "--print-config", *words, monkeypatch=monkeypatch, capsys=capsys)
    names = ("learning_rate", "norm_learning_rate", "head_learning_rate")
    for name, value in (("engine", engine), *zip(names, rates, strict=True)):
        line = next(line for line in output.out.splitlines() if line.startswith(f"{name}: "))
        assert line == f"{name}: null  # {value}" if value else "null" not in line
    assert "language: null  # Language of SLAKE's questions: en (the default) or zh." in output.out


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ["epochs=3"]),
        ("eval", []),
        ("eval", ["runs/a=b", "split=train", "--skip-bad-rows"]),
        ("merge", ["check_base=false"]),
        ("merge", ["--base", "x=y", "adapter=here", "out=--there"]),
    ],
)
def test_printed_options_are_a_file_that_gives_them_again(command, words, config, monkeypatch, capsys):
    code, first = fastln(command, "--print-config", *words, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    # Every option and argument, what is required among them.
    assert set(yaml.safe_load(first.out)) == {option.name for option in COMMANDS[command].params} - {"help"}
    again = fastln(command, f"--config={config(first.out)}", "--print-config", monkeypatch=monkeypatch, capsys=capsys)
    assert again == (0, first)


@pytest.mark.parametrize(
    ("words", "expanded"),
    [
        (["model=runs/ln", "data=d"], ["--data=d", "--", "runs/ln"]),
        (["--data", "a=b", "runs/lr=1", "split=train"], ["--split=train", "--data", "a=b", "--", "runs/lr=1"]),
        (["./lr=1"], ["--", "./lr=1"]),
        (["--", "lr=1"], ["--", "lr=1"]),
        (["model=lr=1"], ["--", "lr=1"]),
        (["model=there", "here"], ["--", "here"]),
        (["dual:a=1,b", "--data=x"], ["--data=x", "--", "dual:a=1,b"]),
    ],
)
def test_an_argument_has_a_key_and_a_path_is_not_mistaken_for_one(words, expanded):
    assert expand(COMMANDS["eval"], words) == expanded


@pytest.mark.parametrize(
    "name", ["1.10", "010", "no", "on", "Off", "1_000", "12:30", "2026-11-26", "1e3", "0x10", "'null'", '"true"']
)
def test_a_name_that_looks_like_a_number_stays_as_it_is(name, config):
    bare = name.strip("'\"")
    for words in ([f"out={name}"], ["--config", str(config(f"out: {name}"))]):
        assert expand(TRAIN, words) == [f"--out={bare}"]


def test_an_argument_stands_in_the_file_too(config):
    path = config("adapter: a\nbase: b\nout: c\n")
    assert expand(COMMANDS["merge"], ["--config", str(path), "out=d"]) == ["--out=d", "--base=b", "--", "a"]
    assert expand(COMMANDS["merge"], ["--config", str(path), "e"]) == ["--out=c", "--base=b", "--", "e"]


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("epoch: 3", [], "run.yaml: unknown key 'epoch'; did you mean 'epochs'? (valid: out, data"),
        ("", ["bach_size=3"], "bach_size=3: unknown key 'bach_size'; did you mean 'batch_size'?"),
        ("epochs: [1, 2]", [], "run.yaml: epochs must be one value, not ['1', '2']"),
        ("scope: [[vision]]", [], "run.yaml: scope must be a list of values, not [['vision']]"),
        ("resume: 3", [], "run.yaml: resume must be true or false, not '3'"),
        ("- epochs", [], "run.yaml: must contain lines of the form `key: value`, not a list"),
        ("epochs: {", [], "run.yaml: not valid YAML: while parsing"),
        ("", ["epochs=]"], "epochs=]: the value is not valid YAML"),
    ],
)
def test_what_is_refused(text, words, message, config):
    with pytest.raises(FastLNError) as caught:
        expand(TRAIN, ["--config", str(config(text)), *words])
    assert message in str(caught.value)


def test_no_file_is_an_error_of_one_line(tmp_path, monkeypatch, capsys):
    code, output = fastln("train", "--config", tmp_path / "no", monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert output.err.startswith("error: --config ")
    assert "cannot be read" in output.err


def test_values_are_checked_as_options_are(config, monkeypatch, capsys):
    code, output = fastln("train", "--config", config("epochs: many\nout: x"), monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert "--epochs" in output.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["eval", "runs/ln", "spilt=test"],
            "error: spilt=test: unknown key 'spilt'; did you mean 'split'? (valid: model",
        ),
        (["merge", "adaptor=x"], "error: adaptor=x: unknown key 'adaptor'; did you mean 'adapter'?"),
        (["merge", "adapter=[x, y]"], "error: adapter=[x, y]: adapter must be one value, not ['x', 'y']"),
        (["eval", "split=test"], "error: give a model, or an adapter that names its base"),
        (["doctor", "json=true"], "json=true"),
    ],
)
def test_what_commands_refuse(words, message, monkeypatch, capsys):
    code, output = fastln(*words, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2
    assert message in output.err


@pytest.mark.parametrize(
    ("model", "method", "shown", "rates"),
    [
        ("dual", "layernorm", "vision 9,984 of 11,116,032", "norms 0.003, task head 0.001"),
        (
            "blip",
            "LN-F-T",
            "text 0 of 9,884,928, decoder 10,034,560",
            "norms 0.003, the method's others 5e-05",
        ),
    ],
)
def test_a_dry_run_shows_what_would_be_and_writes_nothing(model, method, shown, rates, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [f"model={model}", f"method={method}", "batch_size=4", "dtype=float32"]
    monkeypatch.setattr(sys, "argv", ["fastln", "train", "--dry-run", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert shown in text
    assert f"learning rates at their highest: {rates}" in text
    assert "memory, predicted: " in text
    assert re.search(r"stored for backward by the largest batch, 4 questions on [1-4] image\(s\) \(measured\) ", text)
    assert "first batch: 4 questions, loss " in text
    assert "reads '" in text
    assert ("learns '" in text) == (model == "blip")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "limit"),
    [
        ([], "none"),
        (["--skip-bad-rows"], "all"),
        (["--skip-bad-rows", "--epochs", "3"], "all"),
        (["--skip-bad-rows", "epochs=3"], "all"),
        (["--skip-bad-rows", "1%"], "1%"),
        (["--skip-bad-rows", "20", "--epochs", "3"], "20"),
        (["--skip-bad-rows=0.5%"], "0.5%"),
        (["--skip-bad-rows=all"], "all"),
        (["skip_bad_rows=true"], "true"),
        (["skip-bad-rows=20"], "20"),
        (["skip_bad_rows=1%", "--skip-bad-rows"], "all"),
        (["skip_bad_rows=false"], "false"),
    ],
)
def test_an_option_that_may_stand_without_a_value(words, limit, monkeypatch, capsys):
    code, output = fastln("train", "--print-config", *words, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert str(yaml.safe_load(output.out)["skip_bad_rows"]) == limit


@pytest.mark.parametrize("value", ["true", "1%", "20", "all"])
def test_a_limit_in_a_file_is_that_of_the_option(value, config, monkeypatch, capsys):
    path = config(f"skip_bad_rows: {value}\n")
    _, output = fastln("eval", "m", "--config", path, "--print-config", monkeypatch=monkeypatch, capsys=capsys)
    printed = yaml.safe_load(output.out)["skip_bad_rows"]
    assert DataOptions(skip_bad_rows=printed) == DataOptions(skip_bad_rows=yaml.safe_load(value))


def test_what_follows_an_option_without_a_value_is_an_argument():
    words = expand(COMMANDS["eval"], _with_values(["--skip-bad-rows", "runs/ln", "--", "--skip-bad-rows"]))
    assert words == ["--skip-bad-rows=all", "--", "runs/ln", "--skip-bad-rows"]
    assert _with_values(["--skip-bad-rows", "1%", "runs/ln"]) == ["--skip-bad-rows=1%", "runs/ln"]


def test_a_wrong_limit_is_one_line(monkeypatch, capsys):
    for command in (["train"], ["eval", "dual"], ["bench"]):
        code, output = fastln(*command, "--skip-bad-rows=some", monkeypatch=monkeypatch, capsys=capsys)
        assert code == 2
        assert output.err.strip().splitlines()[-1].startswith("error: ")
        assert "skip_bad_rows must be all, a number of rows such as 20, or a share" in output.err

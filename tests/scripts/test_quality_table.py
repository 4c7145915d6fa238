"""The table of answer quality: data without closed and open questions, reports, and runs that fail."""

import json
import sys
from types import SimpleNamespace

import pytest
import quality_table

from fastln.methods import METHODS

ANSWERS = {"all": 50.0, "closed": 60.0, "open": 40.0}
UNLABELLED = {"all": 50.0, "closed": None, "open": None}
REPORTS = {"rouge_l": 0.25, "bleu_4": 0.125, "cider": None}


def record(scores, *, method="layernorm", rate=3e-3, seed=0, short=False):
    return {
        "run": {
            "data": "d",
            "model": "m",
            "validation": quality_table.VALIDATION if short else 0.0,
            "config": {"method": method, "learning_rate": rate, "seed": seed, "epochs": 5, "head_epochs": 3},
        },
        "engine": "fastln",
        "finished": True,
        "test": scores,
        "validation": scores if short else None,
        "training": {"seconds": 60.0, "trainable_parameters": 1234, "losses": [1.0]},
        "adapter_bytes": 99,
    }


def cells(table):
    """Return the cells of a table with one line, by their headings."""
    heading, _, line = (row.strip("| ").split(" | ") for row in table.splitlines())
    return dict(zip(heading, line, strict=True))


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        (ANSWERS, {"all %": "50.0 ± 0.0", "closed %": "60.0 ± 0.0", "open %": "40.0 ± 0.0"}),
        (UNLABELLED, {"all %": "50.0 ± 0.0", "closed %": "–", "open %": "–"}),
        (REPORTS, {"ROUGE-L": "0.250 ± 0.000", "BLEU-4": "0.125 ± 0.000", "CIDEr": "–"}),
    ],
    ids=["answers", "answers without labels", "reports"],
)
def test_scores_that_the_data_lacks_are_dashes(scores, shown):
    records = [record(scores, short=True), record(scores, seed=0), record(scores, seed=1)]
    table = cells(quality_table.table(records, {}))
    assert {heading: table[heading] for heading in shown} == shown
    assert table["adapter bytes"] == "99"


def test_the_rate_with_the_best_score_is_chosen():
    worse = {score: value and value / 2 for score, value in REPORTS.items()}
    short = [record(worse, rate=1e-3), record(REPORTS, rate=1e-2)]
    assert quality_table.best_rate(short) == 1e-2


def test_a_run_that_fails_is_named_and_the_others_make_the_table(tmp_path, monkeypatch, capsys):
    """Every run of one method ends with an error."""

    def train(command, **_):
        options = dict(zip(command[5::2], command[6::2], strict=True))
        config = {
            name: type_(options[f"--{name.replace('_', '-')}"])
            for name, type_ in (
                ("method", str), ("learning_rate", float), ("seed", int), ("epochs", int), ("head_epochs", int)
            )
        }  # fmt: skip
        if config["method"] == "lora":
            return SimpleNamespace(returncode=2)
        made = record(UNLABELLED, short=options["--validation"] != "0.0")
        made["run"] = {"data": options["--data"], "model": options["--model"]} | {
            "validation": float(options["--validation"]),
            "config": config,
        }
        (tmp_path / options["--out"] / "run.json").write_text(json.dumps(made))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(quality_table.subprocess, "run", train)
    monkeypatch.setattr(quality_table, "settle", lambda *_: (None, None, {}))
    arguments = ["--data", "d", "--model", "m", "--out", str(tmp_path / "out"), "--methods", "layernorm", "lora"]
    monkeypatch.setattr(sys, "argv", ["quality_table.py", *arguments, "--seeds", "1"])
    with pytest.raises(SystemExit) as end:
        quality_table.main()
    assert end.value.code == 1
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    rate = METHODS["lora"].learning_rate
    assert f"**Missing:** sweep-lora-{rate:.1e} failed with exit status 2; see " in lines[0]
    assert sum(line.startswith("**Missing:**") for line in lines) == len(quality_table.RATES)
    assert lines[-1].startswith("| layernorm | fastln |")
    assert "sweep-lora" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "model", "others"),
    [
        ("layernorm", "dual:a,b", {"head_learning_rate": 1e-3}),
        ("layernorm+bias", "dual:a,b", {"norm_learning_rate": 3e-3, "head_learning_rate": 1e-3}),
        ("layernorm-full", "blip:a", {"norm_learning_rate": 3e-3}),
        ("head", "dual:a,b", {}),
        ("full", "blip:a", {}),
    ],
)
def test_a_sweep_leaves_the_rates_of_the_head_and_of_norms_beside_others(method, model, others):
    assert quality_table.other_rates(SimpleNamespace(model=model), method) == others

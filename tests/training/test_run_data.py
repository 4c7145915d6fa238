"""fastln train and fastln eval on datasets as they are published: splits, options, scores, and what models refuse."""

import json
from dataclasses import asdict

import pytest
import tiny
import tiny_chat
from layouts import LAYOUTS

from fastln.data import DataOptions, load_dataset
from fastln.errors import FastLNError
from fastln.metrics import Accuracy, ReportScores
from fastln.models import chat_task, load_task
from fastln.training import TrainConfig
from fastln.training.eval_run import EvalRun, run_evaluation
from fastln.training.run import TrainRun, run_training

SLAKE, PLAIN = LAYOUTS["slake"], LAYOUTS["plain, jsonl"]
CONFIG = TrainConfig(epochs=1, head_epochs=1, batch_size=4)


@pytest.fixture
def model(tmp_path) -> str:
    tiny.towers(tmp_path, tiny.phantom(4).samples)
    return f"dual:{tmp_path / 'vision'},{tmp_path / 'text'}"


@pytest.fixture
def blip(tmp_path) -> str:
    tiny.blip_config().to_json_file(tmp_path / "tiny.json")
    return f"blip:{tmp_path / 'tiny.json'}"


def test_published_splits_are_trained_on_and_scored(model, tmp_path, capsys):
    bad = SLAKE.answer(SLAKE.row(3), "?")
    data = SLAKE.make(tmp_path / "data", train=[SLAKE.row(n) for n in (0, 1, 2)] + [bad], validation=[SLAKE.row(3)] * 2)
    with pytest.raises(FastLNError, match=r"1 bad row\(s\)"):
        run_training(TrainRun(data, model, None, CONFIG), tmp_path / "out")
    options = DataOptions(skip_bad_rows=True)
    outcome = run_training(TrainRun(data, model, None, CONFIG, options=options), tmp_path / "out")
    assert isinstance(outcome.validation, Accuracy)
    assert (outcome.validation.n_all, outcome.test.n_all) == (2, 1)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["run"]["options"] == asdict(options)
    assert record["test"]["by_answer"]["n_open"] == 1
    assert "slake validation: exact match: all " in capsys.readouterr().out
    metrics = tmp_path / "metrics.json"
    scores = run_evaluation(EvalRun(str(tmp_path / "out"), data, "validation", metrics=metrics, options=options))
    assert scores == outcome.validation
    written = json.loads(metrics.read_text())
    assert written == {"model": str(tmp_path / "out" / "model"), "data": "slake", "split": "validation"} | asdict(
        scores
    )
    with pytest.raises(FastLNError, match="the run to resume had options"):
        run_training(TrainRun(data, model, None, CONFIG), tmp_path / "out", resume=True)


def test_data_without_a_test_split_trains(model, tmp_path):
    data = PLAIN.make(tmp_path / "data", train=[PLAIN.row(n) for n in (0, 1, 2)])
    outcome = run_training(TrainRun(f"{data}/train.jsonl", model, None, CONFIG), tmp_path / "out")
    assert (outcome.test, outcome.validation) == (None, None)
    with pytest.raises(FastLNError, match="has no test split, only train; --split names another"):
        run_evaluation(EvalRun(str(tmp_path / "out"), f"{data}/train.jsonl"))


@pytest.mark.parametrize(("name", "what"), [("iu-xray", "reports and several images"), ("llava-med", "conversations")])
@pytest.mark.parametrize("kind", tiny.TASKS)
def test_models_say_what_they_cannot_take(kind, name, what, tmp_path, request):
    spec = request.getfixturevalue({"dual": "model"}.get(kind, kind))
    data = load_dataset(LAYOUTS[name].make(tmp_path / "data"), "train")
    with pytest.raises(FastLNError, match=f"holds {what}, which .* cannot take: it answers one question about one im"):
        load_task(spec, data)


def test_reports_are_scored_as_reports(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(chat_task, "LONG_ANSWER_TOKENS", 16)
    data = LAYOUTS["iu-xray"].make(tmp_path / "data")
    files = {"predictions": tmp_path / "p.jsonl", "metrics": tmp_path / "m.json"}
    scores = run_evaluation(EvalRun(tiny_chat.config(tmp_path, "llava"), data, "test", **files))
    assert isinstance(scores, ReportScores)
    written = json.loads((tmp_path / "m.json").read_text())
    assert (written["rouge_l"], written["cider"]) == (scores.rouge_l, None)
    first, *notes = capsys.readouterr().out.splitlines()
    assert first.startswith("iu-xray test: 1 reports: BLEU-1 to 4 ")
    assert "  note: CIDEr needs at least two different references: not scored" in notes
    assert notes[-1].startswith("  note: towers of random weights")
    (row,) = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert (row["views"], row["question"]) == (["CXR2_IM-0001/1.png"], "")


def test_files_that_cannot_be_written_are_found_first(tmp_path):
    with pytest.raises(FastLNError, match="the folder for the metrics does not exist"):
        run_evaluation(EvalRun("dual", "phantom", "test", metrics=tmp_path / "no" / "such"))
    with pytest.raises(FastLNError, match="is a folder; name a file for the metrics"):
        run_evaluation(EvalRun("dual", "phantom", "test", metrics=tmp_path))


def test_what_is_written_keeps_the_letters_of_every_language(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_task, "ANSWER_TOKENS", 2)
    row = PLAIN.row(2) | {"question": "Röntgen 头部?"}
    data = PLAIN.make(tmp_path / "Übung", test=[row])
    files = {"predictions": tmp_path / "p.jsonl", "metrics": tmp_path / "m.json"}
    run_evaluation(EvalRun(tiny_chat.config(tmp_path, "llava"), data, "test", **files))
    assert '"question": "Röntgen 头部?"' in (tmp_path / "p.jsonl").read_text(encoding="utf-8")
    assert '"data": "Übung"' in (tmp_path / "m.json").read_text(encoding="utf-8")

"""The rows of trained language models: written as they come, and not measured twice."""

import argparse
import json

import impressions
import pytest


@pytest.fixture
def options(tmp_path):
    settings = {"epochs": 1, "batch_size": 8, "learning_rate": None, "train": 9, "test": None}
    return argparse.Namespace(
        model="chat:somewhere/small", products=["exact", "int8"], seeds=2, out=tmp_path / "rows.json", **settings
    )


def test_a_stopped_run_goes_on_where_it_was(options, monkeypatch):
    taken = []

    def run(options, products, seed):
        taken.append((products, seed))
        if len(taken) == 3:
            raise KeyboardInterrupt
        return {"products": products, "seed": seed, "train_loss": 1.0, "loss": 2.0 + seed, "rouge_l": 0.5}

    monkeypatch.setattr(impressions, "run", run)
    marks = {"before_training": "before training", "commonest_impression": "the commonest impression"}
    for name, products in marks.items():
        monkeypatch.setattr(impressions, name, lambda _, products=products: {"products": products, "rouge_l": 0.1})
    with pytest.raises(KeyboardInterrupt):
        impressions.measure(options)
    assert len(json.loads(options.out.read_text())) == 4
    rows = impressions.measure(options)
    assert taken == [("exact", 0), ("int8", 0), ("exact", 1), ("exact", 1), ("int8", 1)]
    assert rows == json.loads(options.out.read_text())
    assert "| int8 | 2 | 1.0000 ± 0.0000 | 2.5000 ± 0.7071 | 0.5000 ± 0.0000 |" in impressions.table(rows)
    assert "| the commonest impression | – | – | – | 0.1000 |" in impressions.table(rows)
    options.train = 8
    with pytest.raises(SystemExit, match="rows of other options"):
        impressions.measure(options)

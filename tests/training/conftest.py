"""The command line in this process, a few questions in files, and runs that are interrupted."""

import dataclasses
import json
import sys

import pytest

from fastln import cli
from fastln.data import DataOptions, Source, load_dataset, load_source
from fastln.training import eval_run, run
from fastln.training.resumable import ResumableTrainer


@pytest.fixture
def command(monkeypatch):
    """Run the command line in this process, and check its exit status."""

    def run(*words: object, status: int = 0) -> None:
        monkeypatch.setattr(sys, "argv", ["fastln", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert (end.value.code or 0) == status

    return run


@pytest.fixture
def few(monkeypatch) -> None:
    """Make every split of the phantom small."""

    def load(spec: str, options: DataOptions | None = None) -> Source:
        source = load_source(spec, options)
        return dataclasses.replace(source, splits={name: rows[:24] for name, rows in source.splits.items()})

    for module in (run, eval_run):
        monkeypatch.setattr(module, "load_source", load)


@pytest.fixture
def phantom(tmp_path) -> str:
    """A few questions of the embedded data, as files."""
    for split, count in (("train", 12), ("test", 6)):
        data = load_dataset("phantom", split)
        rows = []
        for sample in data.samples[:count]:
            name = f"{sample.image}.png"
            (tmp_path / "phantom" / "images").mkdir(parents=True, exist_ok=True)
            data.image(sample.image).save(tmp_path / "phantom" / "images" / name)
            rows.append({"image": name, "question": sample.question, "answer": sample.answer})
        (tmp_path / "phantom" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "phantom")


@pytest.fixture
def stop_after(monkeypatch):
    """Have runs interrupted once they have written that many checkpoints; what it returns ends that."""

    def stop(n_epochs: int):
        save = ResumableTrainer._save_checkpoint
        written = []

        def interrupted(*args, **kwargs):
            save(*args, **kwargs)
            written.append(1)
            if len(written) == n_epochs:
                raise KeyboardInterrupt

        monkeypatch.setattr(ResumableTrainer, "_save_checkpoint", interrupted)
        return lambda: monkeypatch.setattr(ResumableTrainer, "_save_checkpoint", save)

    return stop

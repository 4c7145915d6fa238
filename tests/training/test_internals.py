"""What the trainers rely on in other packages is checked where they are imported, and the list of it is complete."""

import dataclasses
import importlib.util
import tomllib
from pathlib import Path

import pytest
from transformers import Trainer, __version__

from fastln import FastLNError
from fastln.training import resumable
from fastln.training.fastln_trainer import FastLNTrainer
from fastln.training.internals import INTERNALS, SUPPORTED, check_internals
from fastln.training.task_trainer import TaskTrainer


def test_every_underscore_method_that_a_trainer_overrides_is_checked():
    ours = {cls for trainer in (FastLNTrainer, TaskTrainer) for cls in trainer.__mro__ if not issubclass(Trainer, cls)}
    overridden = {name for cls in ours for name in vars(cls) if name.startswith("_") and hasattr(Trainer, name)}
    overridden = {name for name in overridden if not name.startswith("__")}
    checked = {internal.name for internal in INTERNALS if internal.owner is Trainer}
    assert len(overridden) == 11
    assert overridden == {name for name in checked if name.startswith("_")}


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda internal: f"{internal.owner.__name__}.{internal.name}")
def test_what_a_release_renames_is_named_with_its_version(internal):
    class Renamed:
        pass

    supported = rf"; install {internal.package}>=\d"
    with pytest.raises(
        FastLNError, match=rf"^{internal.package} \d\S* .*Renamed\.{internal.name} is missing{supported}"
    ):
        check_internals([dataclasses.replace(internal, owner=Renamed)])


def test_what_a_release_gives_other_arguments_is_named():
    class Changed:
        def _save_checkpoint(self, trial, model=None):
            pass

    (internal,) = (internal for internal in INTERNALS if internal.name == "_save_checkpoint")
    check_internals([internal])
    wrong = r"Changed\._save_checkpoint takes \(trial, model\), not \(model, trial\), as its first parameters"
    with pytest.raises(FastLNError, match=rf"transformers {__version__} does not fit fastln: {wrong}; install"):
        check_internals([dataclasses.replace(internal, owner=Changed)])


def test_it_is_checked_where_the_trainer_is_imported(monkeypatch):
    assert issubclass(FastLNTrainer, resumable.ResumableTrainer)
    again = importlib.util.spec_from_file_location("again", resumable.__file__)
    monkeypatch.delattr(Trainer, "_evaluate")
    with pytest.raises(FastLNError, match=r"Trainer\._evaluate is missing"):
        again.loader.exec_module(importlib.util.module_from_spec(again))


def test_the_supported_versions_are_those_that_are_installed_with_fastln():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert {f"{package}{versions}" for package, versions in SUPPORTED.items()} <= set(project["dependencies"])

"""The versions that fastln is tested with: one place says them, and the import warns of others."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fastln import versions


def test_the_tested_versions_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    bounds = [requirement.removesuffix("; sys_platform == 'linux'") for requirement in project["dependencies"]]
    for package, tested in versions.TESTED_VERSIONS.items():
        assert f"{package}{tested}" in bounds
        assert "<" in tested, "an upper bound"


@pytest.mark.parametrize(
    ("torch_version", "transformers_version", "told"),
    [
        ("2.13.0+cpu", "5.23.1", None),
        ("2.14.0", "5.23.0", "fastln is not tested with torch 2.14.0 (tested: >=2.13,<2.14): results may be wrong;"),
        ("2.14.0.dev20270101", "5.23.0", "torch 2.14.0.dev20270101 (tested"),
        ("2.12.1", "6.0.0", "torch 2.12.1 (tested: >=2.13,<2.14) and transformers 6.0.0 (tested: >=5.23,<5.24)"),
    ],
)
def test_untested_versions_are_one_warning_that_can_be_silenced(
    torch_version, transformers_version, told, monkeypatch, caplog
):
    found = {"torch": torch_version, "transformers": transformers_version}
    monkeypatch.setattr(versions, "package_version", found.get)
    monkeypatch.delenv("FASTLN_UNTESTED_VERSIONS", raising=False)
    versions.warn_of_untested_versions()
    assert len(caplog.records) == (told is not None)
    assert (told or "") in caplog.text
    caplog.clear()
    monkeypatch.setenv("FASTLN_UNTESTED_VERSIONS", "1")
    versions.warn_of_untested_versions()
    assert not caplog.records


def test_the_import_warns_of_untested_versions():
    program = """
import importlib.metadata
real = importlib.metadata.version
importlib.metadata.version = lambda package: "9.0" if package == "transformers" else real(package)
import fastln
"""
    environment = {name: value for name, value in os.environ.items() if name != "FASTLN_UNTESTED_VERSIONS"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    lines = [line for line in done.stderr.splitlines() if "not tested" in line]
    assert len(lines) == 1
    assert "transformers 9.0 (tested: >=5.23,<5.24)" in lines[0]

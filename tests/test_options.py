"""Nothing in silence: an option of the command line, or a setting that it fills, is read by something."""

import ast
import inspect
from pathlib import Path

import pytest

import fastln
from fastln import cli

COMMANDS = {command.name or command.callback.__name__: command.callback for command in cli.app.registered_commands}
# What the commands fill, of the options of `train`, `eval` and `bench`.
SETTINGS = ("TrainConfig", "TrainRun", "DataOptions", "Suite")
TREES = [ast.parse(path.read_text()) for path in sorted(Path(fastln.__file__).parent.rglob("*.py"))]


def unread(function) -> set[str]:
    """Return the parameters of a function that its body never reads."""
    body = ast.parse(inspect.getsource(function)).body[0].body
    read = {node.id for part in body for node in ast.walk(part) if isinstance(node, ast.Name)}
    return set(inspect.signature(function).parameters) - read


def _ignores(one, other):
    return one


def test_an_option_that_is_not_read_is_found():
    assert unread(_ignores) == {"other"}
    assert {"bench", "train", "eval", "merge", "doctor"} <= COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_reaches_something(command):
    assert unread(COMMANDS[command]) == set()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_read(name):
    nodes = [node for tree in TREES for node in ast.walk(tree)]
    (definition,) = (node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name)
    fields = {node.target.id for node in definition.body if isinstance(node, ast.AnnAssign)}
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    assert fields
    assert fields - read == set()

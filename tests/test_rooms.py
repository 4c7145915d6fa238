"""Imports point one way: a room of the house knows those below it, and none above or beside it."""

import ast
import graphlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (ROOT / "src" / "fastln", ROOT / "kernels" / "fastln_kernels")
# Bottom to top. A room imports from the lines before its own; rooms of one line do not know each other.
LAYERS = """
    fastln_kernels
    errors
    changes devices files machine origin originals processes progress reading rounding sizes versions
    fingerprint ops
    decision families late
    fits methods standins
    int8_rules memory state workspace
    decider lifetimes rates
    peak
    step_time
    budget
    plan watch
    prepare settings
    cost
    adapters
    engines
    data
    metrics models
    merge
    training
    bench cli_options configured doctor
    planning
    plan_command
    cli
    __main__
"""
LEVEL = {room: level for level, line in enumerate(LAYERS.strip().splitlines()) for room in line.split()}
# A class of one of transformers' models; neither what all share (PreTrainedModel) nor what looks one up (AutoModel).
MODEL_CLASS = re.compile(r"(?!PreTrained|Auto)[A-Z]\w*(Model|For[A-Z]\w+|Attention|MLP|Output|Norm|Encoder|Layer)")


def modules() -> dict[str, Path]:
    """Return every module of the sources, by its dotted name."""
    found = {}
    for source in SOURCES:
        for path in sorted(source.rglob("*.py")):
            parts = path.relative_to(source.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """Yield the dotted name of everything that the file imports, in functions too; not what types alone need."""
    tree = ast.parse(path.read_text())
    for_types = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for_types |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str | None:
    """Return the room of a dotted name: `ops` of `fastln.ops.norm`; None for the package and for what is not ours."""
    package, *rest = name.split(".")
    if package == "fastln_kernels":
        return package
    return rest[0] if package == "fastln" and rest else None


def imports_between_rooms() -> dict[tuple[str, str], set[str]]:
    """Return (room, room that it imports) -> the modules that do."""
    found = defaultdict(set)
    for name, path in MODULES.items():
        for other in imported(path):
            pair = room(name), room(other)
            if None not in pair and pair[0] != pair[1]:
                found[pair].add(name)
    return found


def test_every_room_has_its_place():
    rooms = {room(name) for name in MODULES} - {None}
    assert len(rooms) > 15
    assert rooms - LEVEL.keys() == set(), "a new room needs a line in LAYERS"


def test_rooms_import_from_below_alone():
    wrong = {pair: names for pair, names in imports_between_rooms().items() if LEVEL[pair[1]] >= LEVEL[pair[0]]}
    assert wrong == {}


def test_rooms_do_not_go_through_the_front_door():
    """`import fastln` in a room would import every other room with it."""
    inner = {name: set(imported(path)) for name, path in MODULES.items() if room(name)}
    assert [name for name, names in inner.items() if "fastln" in names] == []


def test_modules_of_a_room_import_in_no_circle():
    graph = {}
    for name, path in MODULES.items():
        # `from fastln.ops import norm` may name a module or something in one.
        targets = {other if other in MODULES else other.rpartition(".")[0] for other in imported(path)}
        graph[name] = (targets & MODULES.keys()) - {name}
    # A package imports its modules; a module that imports from its own package sees what is there by then.
    for name in graph:
        graph[name] = {other for other in graph[name] if not name.startswith(f"{other}.")}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_device_code_knows_torch_and_triton_alone():
    allowed = {"fastln_kernels", "torch", "triton", *sys.stdlib_module_names}
    for name, path in MODULES.items():
        if room(name) == "fastln_kernels":
            assert {other.split(".")[0] for other in imported(path)} <= allowed, name


def test_models_of_transformers_are_known_where_they_are_recognised_replaced_or_loaded():
    knowing = set()
    for name, path in MODULES.items():
        for other in imported(path):
            package, _, rest = other.partition(".")
            of_a_model = rest.startswith("models.") and not rest.startswith("models.auto.")
            if package == "transformers" and (of_a_model or MODEL_CLASS.fullmatch(rest)):
                knowing.add(room(name))
    assert "models" in knowing
    assert knowing <= {"families", "standins", "models"}


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("import a.b, c", ["a.b", "c"]),
        ("def f():\n    from a.b import c, d", ["a.b.c", "a.b.d"]),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a import b", ["typing.TYPE_CHECKING"]),
    ],
)
def test_what_counts_as_an_import(code, names, tmp_path):
    (tmp_path / "some.py").write_text(code)
    assert list(imported(tmp_path / "some.py")) == names

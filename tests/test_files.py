"""Text files are UTF-8 whatever the system's encoding is, and JSON is written as people read it."""

import ast
import json

import pytest
from test_rooms import MODULES

from fastln.files import json_text
from fastln.training.record import write_json

TEXT = {"open", "read_text", "write_text"}
# What they read is ASCII: the kernel's own files.
SYSTEM = {"fastln.machine", "fastln.memory", "fastln_kernels.cpu.library"}


def unsaid(tree):
    """Yield the calls that read or write text in an encoding that they do not name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TEXT:
            said = {keyword.arg for keyword in node.keywords} & {"encoding", "formats"}
            modes = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            binary = node.func.attr == "open" and any("b" in mode for mode in modes)
            system = isinstance(node.func.value, ast.Name) and node.func.value.id in ("os", "Image")
            if not (said or binary or system):
                yield ast.unparse(node)


@pytest.mark.parametrize(
    ("code", "count"),
    [("p.open()", 1), ("p.read_text()", 1), ("p.open('rb')", 0), ("p.write_text(x, encoding='utf-8')", 0)],
)
def test_what_counts_as_unsaid(code, count):
    assert len(list(unsaid(ast.parse(code)))) == count


def test_every_text_file_has_a_named_encoding():
    found = {name: list(unsaid(ast.parse(path.read_text(encoding="utf-8")))) for name, path in MODULES.items()}
    assert {name: calls for name, calls in found.items() if calls and name not in SYSTEM} == {}


def test_json_is_readable(tmp_path):
    values = {"name": "Röntgen 头部", "path": tmp_path}
    assert json_text(values) == f'{{"name": "Röntgen 头部", "path": "{tmp_path}"}}'
    write_json(tmp_path / "run.json", values)
    assert '"Röntgen 头部"' in (tmp_path / "run.json").read_text(encoding="utf-8")


def test_json_of_a_name_that_is_no_utf_8():
    name = b"R\xf6ntgen.png".decode(errors="surrogateescape")
    text = json_text({"name": name, "of": "ö"})
    assert text.isascii()
    assert json.loads(text) == {"name": name, "of": "ö"}

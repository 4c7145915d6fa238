"""The documentation: links, anchors, paths, commands and code in it are right, without network."""

import ast
import functools
import re
import shlex
import unicodedata
from pathlib import Path

import pytest
import typer
import yaml

from fastln.cli import app
from fastln.data.loading import READERS
from fastln.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md")),
    *sorted(DOCS.rglob("*.md")),
]
README_LINES = 130
FENCE = re.compile(r"^ *```(?P<language>\w*)\n(?P<code>.*?)^ *```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#+ (?P<text>.+)$", re.MULTILINE)
INLINE = re.compile(r"`(?P<code>[^`\n]+)`")
PLACE = re.compile(r"(?<![\w./$~-])(?:src|kernels|tests|scripts|benchmarks|docs)/[\w./*-]*\w")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(text):
    return INLINE.sub("`code`", FENCE.sub("", text))


def commands_in(text):
    """Every call of fastln in code blocks and inline code, as words."""
    lines = [line for block in FENCE.finditer(text) for line in block["code"].replace("\\\n", " ").splitlines()]
    lines += [match["code"] for match in INLINE.finditer(FENCE.sub("", text))]
    return [words[1:] for line in lines if line.startswith("fastln ") and (words := shlex.split(line, comments=True))]


def github_anchor(heading):
    kept = "".join(c for c in heading.lower() if c in " -_" or unicodedata.category(c)[0] in "LN")
    return kept.replace(" ", "-")


def mkdocs_anchor(heading):
    """As Python-Markdown's extension `toc` makes it."""
    ascii_text = unicodedata.normalize("NFKD", heading).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_text).strip().lower())


def anchors(page):
    """The anchors of a page's headings that stand there once; in docs/, those that GitHub and MkDocs agree on."""
    headings = [match["text"].replace("`", "") for match in HEADING.finditer(FENCE.sub("", page.read_text()))]
    made = [github_anchor(heading) for heading in headings]
    if page.is_relative_to(DOCS):
        made = [a for a, heading in zip(made, headings, strict=True) if a == mkdocs_anchor(heading)]
    return {anchor for anchor in made if made.count(anchor) == 1}


@functools.cache
def options():
    """The options of every command of fastln, and those that stand in a command's place."""
    app_itself = typer.main.get_command(app)
    commands = app_itself.commands
    alone = {option: set() for parameter in app_itself.params for option in parameter.opts}
    return alone | {
        name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        | {"--help", "--config", "--print-config"}
        for name, command in commands.items()
    }


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


@each_page
def test_links_lead_somewhere(page):
    for match in LINK.finditer(without_code(page.read_text())):
        target, _, anchor = match["target"].partition("#")
        if target.startswith(("http://", "https://")):
            continue
        there = (page.parent / target).resolve() if target else page
        assert there.is_file(), f"{match['target']}: there is no such file"
        assert there.is_relative_to(ROOT)
        if page.is_relative_to(DOCS):
            assert there.is_relative_to(DOCS), f"{match['target']} leads out of docs/, where MkDocs has no page"
        assert not anchor or anchor in anchors(there), f"{match['target']}: no such heading"


def test_every_page_is_in_the_navigation_once():
    found = []

    def collect(entry):
        if isinstance(entry, str):
            found.append(entry)
        for inner in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            collect(inner)

    collect(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(found) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@each_page
def test_python_compiles(page):
    for block in FENCE.finditer(page.read_text()):
        if block["language"] == "python":
            ast.parse(block["code"])


@each_page
def test_commands_and_their_options_exist(page):
    text = page.read_text()
    for command, *words in commands_in(text):
        assert command in options(), f"fastln {command}"
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in options()[command], f"fastln {command} {word}"
    every = options().keys() | set().union(*options().values())
    for match in INLINE.finditer(FENCE.sub("", text)):
        if match["code"].startswith("--"):
            for word in shlex.split(match["code"]):
                assert not word.startswith("--") or word in every, match["code"]


@each_page
def test_make_targets_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    code = [*(block["code"] for block in FENCE.finditer(page.read_text()))]
    code += [match["code"] for match in INLINE.finditer(FENCE.sub("", page.read_text()))]
    for text in code:
        for target in re.findall(r"^make ([a-z-]+)", text, re.MULTILINE):
            assert target in targets, f"make {target}"


@each_page
def test_files_that_are_named_exist(page):
    text = page.read_text()
    code = [*(block["code"] for block in FENCE.finditer(text))]
    code += [match["code"] for match in INLINE.finditer(FENCE.sub("", text))]
    for place in {place for part in code for place in PLACE.findall(part)}:
        if "NAME" not in place:
            assert any(ROOT.glob(place)), f"{page.relative_to(ROOT)} names {place}, which does not exist"


def test_every_method_and_layout_is_described():
    methods, data = ((DOCS / name).read_text() for name in ("methods.md", "data.md"))
    assert [name for name in METHODS if f"`{name}`" not in methods] == []
    assert [name for name in READERS if f"`{name}`" not in data] == []


SWITCHES = [
    *("norms", "activations", "dropout", "post_norms", "gated_mlps", "attention", "rotary", "linears"),
    *("late_logits", "late_rows", "cache", "checkpointing", "rounding", "arena", "random_heads"),
]


def switches_in(page):
    return re.findall(r"^\| `([a-z_]+)` \|", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "prepare.md"], ids=lambda page: page.name)
def test_the_switches_of_prepare_are_described(page):
    assert switches_in(page) == SWITCHES


def test_the_switches_are_those_of_the_code():
    tricks = pytest.importorskip("fastln.standins.tricks")
    assert list(tricks.TRICKS) == SWITCHES

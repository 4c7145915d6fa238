"""Options and arguments of a command from a YAML file and `key=value` words, turned into those that it takes."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
import yaml
from typer.core import TyperCommand

from fastln.errors import FastLNError

HELP = """--config FILE takes options and arguments from a YAML file whose keys are their names; KEY=VALUE words
overrule it, and options both. --print-config prints the value of each as such a file, and does nothing else."""
PRINT = "--print-config"
_WORD = re.compile(r"([A-Za-z_][\w-]*)=(.*)", re.DOTALL)


class _Loader(yaml.SafeLoader):
    """Leaves all but null, true and false as written: options read numbers themselves, and a folder may be 1.10."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|false"), ["t", "f"])  # not yes, no, on, off


class ConfiguredCommand(TyperCommand):
    """A command whose options and arguments come from `--config FILE` and `key=value` words too.

    A word is `key=value` where letters, digits, `_` and `-` alone stand before its first `=`; a path that looks so is
    given as `./a=b`, or after `--`.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        words = {"options_metavar": "[OPTIONS] [KEY=VALUE]...", "epilog": HELP}
        super().__init__(*args, **(settings | words))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Expand the words and parse them; with `--print-config`, print and stop.

        Raises:
            FastLNError: as `expand` does.
        """
        words = expand(self, [word for word in args if word != PRINT])
        if PRINT not in args:
            return super().parse_args(ctx, words)
        for parameter in self.params:
            parameter.required = False
        super().parse_args(ctx, words)
        typer.echo(self.show(ctx.params), nl=False)
        raise SystemExit(0)

    def show(self, values: dict[str, Any]) -> str:
        """Return every parameter's value as YAML, defaults included, with a comment on what None stands for.

        Args:
            values: by name.
        """
        notes = self.defaults(values)
        lines = []
        for parameter in self.params:
            name = str(parameter.name)
            if name in values:
                value = values[name]
                line = yaml.safe_dump({name: str(value) if isinstance(value, Path) else value})
                note = notes.get(name) or getattr(parameter, "help", None) or ""
                lines.append(f"{line.rstrip()}  # {note}\n" if value is None and note else line)
        return "".join(lines)

    def defaults(self, values: dict[str, Any]) -> dict[str, str]:
        """Return what stands for values that are None, by name; the help does where nothing is told here.

        Args:
            values: of every parameter, by name.
        """
        return {}


def expand(command: TyperCommand, args: list[str]) -> list[str]:
    """Replace `--config FILE` and `key=value` by options and arguments, overruled by those that are there as such.

    Args:
        command: The command.
        args: Its words on the command line, without its own name.

    Returns:
        Words without either.

    Raises:
        FastLNError: for a file that cannot be read, an unknown key (the message names the nearest), or a value of the
            wrong form.
    """
    parameters: dict[str, Any] = {str(parameter.name): parameter for parameter in command.params}
    options = {name: parameter for name, parameter in parameters.items() if parameter.param_type_name == "option"}
    with_value = {word for option in options.values() if not option.is_flag for word in option.opts}
    settled: dict[str, list[str]] = {}
    overrides: dict[str, list[str]] = {}
    others: list[str] = []
    arguments: list[str] = []
    rest = iter(args)
    for word in rest:
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or next(rest, "")
            for key, value in _read(path).items():
                settled |= _words(parameters, str(key), value, path)
        elif word == "--":
            arguments += rest
        elif word in with_value:
            others += [word, *([value] if (value := next(rest, None)) is not None else [])]
        elif word.startswith("-"):
            others.append(word)
        elif pair := _WORD.fullmatch(word):
            overrides |= _words(parameters, pair[1], _parsed(pair[2], word), word)
        else:
            arguments.append(word)
    settled |= overrides
    # A list given as options takes the place of the file's; it does not go on from it.
    given = {word.partition("=")[0] for word in others}
    for name, words in settled.items():
        if name in options:
            others = others if given & set(options[name].opts) else [*words, *others]
    named = [word for name in parameters.keys() - options.keys() for word in settled.get(name, [])]
    arguments = arguments or named
    return [*others, *(["--", *arguments] if arguments else [])]


def _words(parameters: dict[str, Any], key: str, value: Any, where: str) -> dict[str, list[str]]:
    """Return the words by which the parameter `key` gets its value, none for null and for a flag that is false."""
    name = key.replace("-", "_")
    if name not in parameters:
        near = get_close_matches(name, parameters, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FastLNError(f"{where}: unknown key {key!r}{hint} (valid: {', '.join(parameters)})")
    parameter = parameters[name]
    if value is None:
        return {name: []}
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):
            raise FastLNError(f"{where}: {key} must be true or false, not {value!r}")
        return {name: [parameter.opts[0]] if value else list(parameter.secondary_opts[:1])}
    is_list = getattr(parameter, "multiple", False)
    values = value if isinstance(value, list) and is_list else [value]
    if any(isinstance(value, dict | list | bool) for value in values):
        raise FastLNError(f"{where}: {key} must be {'a list of values' if is_list else 'one value'}, not {value!r}")
    prefix = f"{parameter.opts[0]}=" if parameter.param_type_name == "option" else ""
    return {name: [f"{prefix}{value}" for value in values]}


def _read(path: str) -> dict[Any, Any]:
    try:
        values = yaml.load(Path(path).read_text(), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise FastLNError(f"--config {path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise FastLNError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise FastLNError(f"{path}: must hold lines of `key: value`, not a {type(values).__name__}")
    return values or {}


def _parsed(text: str, word: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise FastLNError(f"{word}: the value is not YAML; put it into quotes, and those into others") from None

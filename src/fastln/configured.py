"""Read a command's options and arguments from a YAML file and from `key=value` words."""

from __future__ import annotations

import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
import yaml
from typer.core import TyperCommand

from fastln.errors import FastLNError
from fastln.files import user_path
from fastln.reading import is_skip_limit

HELP = """--config FILE reads options and arguments from a YAML file whose keys are their names. KEY=VALUE words
override the file, and options override both. --print-config prints all values as such a file and exits."""
PRINT = "--print-config"
OPTIONAL: dict[str, tuple[str, Callable[[str], bool]]] = {"--skip-bad-rows": ("all", is_skip_limit)}
"""Options that may stand without a value: the value that they then have, and whether the next word is one."""
_WORD = re.compile(r"([A-Za-z_][\w-]*)=(.*)", re.DOTALL)


class _Loader(yaml.SafeLoader):
    """Loads everything except null, true and false as text.

    The options parse numbers themselves, and a folder may be called 1.10.
    """


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|false"), ["t", "f"])  # not yes, no, on, off


class OptionalValues(TyperCommand):
    """A command whose options in `OPTIONAL` may also stand without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give these options their value, and parse."""
        return super().parse_args(ctx, _with_values(args))


class ConfiguredCommand(OptionalValues):
    """A command that also takes its options and arguments from `--config FILE` and `key=value` words.

    A word counts as `key=value` if only letters, digits, `_` and `-` come before its first `=`. Write a path that looks
    like this as `./a=b`, or put it after `--`.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        words = {"options_metavar": "[OPTIONS] [KEY=VALUE]...", "epilog": HELP}
        super().__init__(*args, **(settings | words))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Expand the words and parse them. With `--print-config`, print the values and exit.

        Raises:
            FastLNError: As for `expand`.
        """
        words = expand(self, _with_values([word for word in args if word != PRINT]))
        if PRINT not in args:
            return super().parse_args(ctx, words)
        for parameter in self.params:
            parameter.required = False
        super().parse_args(ctx, words)
        typer.echo(self.show(ctx.params), nl=False)
        raise SystemExit(0)

    def show(self, values: dict[str, Any]) -> str:
        """Return every parameter's value as YAML, including defaults, with a comment that explains each None.

        Args:
            values: The values by name.
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
        """Return what None means for parameters, by name. Other parameters that are None show their help text.

        Args:
            values: The values of all parameters, by name.
        """
        return {}


def expand(command: TyperCommand, args: list[str]) -> list[str]:
    """Replace `--config FILE` and `key=value` words by options and arguments. Explicit ones override them.

    Args:
        command: The command.
        args: The words on the command line, without the command's name.

    Returns:
        The words, with options and arguments only.

    Raises:
        FastLNError: If a file cannot be read, a key is unknown (the message suggests the closest one), or a value has
            the wrong form.
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
    # A list given as options replaces the file's list; it does not extend it.
    given = {word.partition("=")[0] for word in others}
    for name, words in settled.items():
        if name in options:
            others = others if given & set(options[name].opts) else [*words, *others]
    named = [word for name in parameters.keys() - options.keys() for word in settled.get(name, [])]
    arguments = arguments or named
    return [*others, *(["--", *arguments] if arguments else [])]


def _with_values(args: list[str]) -> list[str]:
    """Write options that may stand without a value as `--option=value`."""
    n_options = args.index("--") if "--" in args else len(args)
    words, rest = [], iter(args[:n_options])
    waiting = next(rest, None)
    while waiting is not None:
        word, waiting = waiting, next(rest, None)
        if word in OPTIONAL:
            value, takes = OPTIONAL[word]
            if waiting is not None and takes(waiting):
                value, waiting = waiting, next(rest, None)
            word = f"{word}={value}"
        words.append(word)
    return words + args[n_options:]


def _words(parameters: dict[str, Any], key: str, value: Any, where: str) -> dict[str, list[str]]:
    """Return the command-line words that set parameter `key`: none for null, or for a false flag without a `--no-`."""
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
    if isinstance(value, bool) and parameter.opts[0] in OPTIONAL:
        value = str(value).lower()
    is_list = getattr(parameter, "multiple", False)
    values = value if isinstance(value, list) and is_list else [value]
    if any(isinstance(value, dict | list | bool) for value in values):
        raise FastLNError(f"{where}: {key} must be {'a list of values' if is_list else 'one value'}, not {value!r}")
    prefix = f"{parameter.opts[0]}=" if parameter.param_type_name == "option" else ""
    return {name: [f"{prefix}{value}" for value in values]}


def _read(path: str) -> dict[Any, Any]:
    try:
        values = yaml.load(user_path(path).read_text(encoding="utf-8-sig"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise FastLNError(f"--config {path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise FastLNError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise FastLNError(f"{path}: must contain lines of the form `key: value`, not a {type(values).__name__}")
    return values or {}


def _parsed(text: str, word: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise FastLNError(f"{word}: the value is not valid YAML; quote it twice, as in 'key=\"value\"'") from None

"""Options of a command from a YAML file and from `key=value` words, turned into the options that the command takes."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
import yaml

from fastln.errors import FastLNError

HELP = """--config FILE takes options from a YAML file whose keys are their names; KEY=VALUE words overrule it, and
options both. --print-config prints every option's value as such a file, and does nothing else."""


def expand(command: Any, args: list[str]) -> list[str]:
    """Replace `--config FILE` and `key=value` by options, put before the others, which overrule them.

    Args:
        command: The command (click's, of `typer.main.get_command`).
        args: Its words on the command line, without its own name.

    Returns:
        Words without either.

    Raises:
        FastLNError: for a file that cannot be read, an unknown key (the message names the nearest), or a value of the
            wrong form.
    """
    options = {str(option.name): option for option in command.params if option.param_type_name == "option"}
    with_value = {name for option in options.values() if not option.is_flag for name in option.opts}
    from_file: dict[str, list[str]] = {}
    overrides: dict[str, list[str]] = {}
    others: list[str] = []
    rest = iter(args)
    for word in rest:
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or next(rest, "")
            for key, value in _read(path).items():
                from_file |= _option(options, str(key), value, path)
        elif word in with_value:
            others += [word, *([value] if (value := next(rest, None)) is not None else [])]
        elif not word.startswith("-") and "=" in word:
            key, _, text = word.partition("=")
            overrides |= _option(options, key, _parsed(text, word), word)
        else:
            others.append(word)
    # A list given as options takes the place of the file's; it does not go on from it.
    given = {word.partition("=")[0] for word in others}
    settled = {key: words for key, words in (from_file | overrides).items() if not given & set(options[key].opts)}
    return [word for words in settled.values() for word in words] + others


def show(command: Any, args: list[str]) -> str:
    """Return every option's value as YAML, defaults included; None where neither line, file nor default has one.

    Args:
        command: The command; what it requires need not be given.
        args: Expanded words.
    """
    for option in command.params:
        option.required = False
    context = command.make_context(command.name, list(args))
    values = {option.name: context.params[option.name] for option in command.params if option.name in context.params}
    values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    return yaml.safe_dump(values, sort_keys=False)


def configure(app: typer.Typer, args: list[str]) -> list[str]:
    """Expand the words of a command line whose command is `train`; with `--print-config`, print and stop.

    Args:
        app: The application.
        args: The command line.

    Raises:
        FastLNError: as `expand` does.
        SystemExit: after printing.
    """
    if args[:1] != ["train"]:
        return args
    group: Any = typer.main.get_command(app)
    command = group.commands["train"]
    printing = "--print-config" in args
    words = expand(command, [word for word in args[1:] if word != "--print-config"])
    if printing:
        typer.echo(show(command, words), nl=False)
        raise SystemExit(0)
    return ["train", *words]


def _option(options: dict[str, Any], key: str, value: Any, where: str) -> dict[str, list[str]]:
    """Return the words by which the option `key` gets its value, none for null and for a flag that is false."""
    name = key.replace("-", "_")
    if name not in options:
        near = get_close_matches(name, options, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise FastLNError(f"{where}: unknown key {key!r}{hint} (valid: {', '.join(options)})")
    option = options[name]
    if value is None:
        return {name: []}
    if option.is_flag:
        if not isinstance(value, bool):
            raise FastLNError(f"{where}: {key} must be true or false, not {value!r}")
        return {name: [option.opts[0]] if value else list(option.secondary_opts[:1])}
    values = value if isinstance(value, list) and option.multiple else [value]
    if any(isinstance(value, dict | list | bool) for value in values):
        raise FastLNError(
            f"{where}: {key} must be {'a list of values' if option.multiple else 'one value'}, not {value!r}"
        )
    return {name: [f"{option.opts[0]}={value}" for value in values]}


def _read(path: str) -> dict[Any, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise FastLNError(f"--config {path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise FastLNError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise FastLNError(f"{path}: must hold lines of `key: value`, not a {type(values).__name__}")
    return values or {}


def _parsed(text: str, word: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise FastLNError(f"{word}: the value is not YAML; put it into quotes, and those into others") from None

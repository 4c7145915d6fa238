"""Where models come from: directories, configuration files and hub names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.hub import cached_file

from fastln.errors import FastLNError
from fastln.files import expanded

# What `fastln train` writes into its output folder.
RECORD = "run.json"
MODEL = "model"

KINDS = ("dual", "blip", "chat")
"""What may stand, with a colon, before the sources of a model."""


def expanded_sources(spec: str) -> str:
    """Return what names a model, as `fastln.models.load_task` takes it, with `fastln.files.expanded` directories."""
    kind, _, sources = spec.partition(":")
    if kind not in KINDS or not sources:
        return expanded(spec)
    return f"{kind}:{','.join(expanded(source.strip()) for source in sources.split(','))}"


def saved_model(source: str) -> str:
    """Return the directory of the model in the output folder of `fastln train`; return any other source unchanged.

    Raises:
        FastLNError: if that run did not finish.
    """
    folder = Path(source)
    if not (folder / RECORD).is_file():
        return source
    if not (folder / MODEL / "config.json").is_file():
        raise FastLNError(f"{source}: this run did not finish, so there is no model yet; continue it with --resume")
    return str(folder / MODEL)


def check_source(source: str) -> None:
    """Check that `source` is a model's directory, or could be a hub name.

    Raises:
        FastLNError: if it is a directory without config.json, or looks like a path and does not exist.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FastLNError(
                f"{source}: there is no config.json in this directory; give a directory that save_pretrained wrote, "
                "or a hub name"
            )
        return
    if path.is_file():
        raise FastLNError(f"{source}: this is a file; give the directory of a model, or a hub name")
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or not source:
        raise FastLNError(f"{source or '(empty)'}: no such directory; give the directory of a model, or a hub name")


def bare_configuration(source: str) -> Path | None:
    """Return the configuration file that `source` names: a .json file, or that of a directory without weights."""
    path = Path(source)
    if path.suffix == ".json":
        return path
    config = path / "config.json"
    has_weights = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
    return config if path.is_dir() and config.is_file() and not has_weights else None


def file_of(source: str, name: str) -> Path | None:
    """Return the path of a model's file; None if the directory or the hub's repository has no such file.

    Raises:
        OSError: if the hub refuses to answer.
    """
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def load_tokenizer(source: str, config: PreTrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer, with the processor's chat template if there is one.

    Args:
        source: a directory or hub name.
        config: the model's configuration, if the one beside the tokenizer is not in transformers' form.
    """
    tokenizer = AutoTokenizer.from_pretrained(source, config=config)
    processor, _ = ProcessorMixin.get_processor_dict(source)
    tokenizer.chat_template = processor.get("chat_template") or tokenizer.chat_template
    return tokenizer


def refuse_missing(source: str, what: str, missing: Iterable[str]) -> None:
    """Check that a checkpoint was complete.

    Args:
        source: where it came from.
        what: what was loaded.
        missing: names of the tensors that it lacked.

    Raises:
        FastLNError: if it lacked any.
    """
    names = sorted(missing)
    if names:
        raise FastLNError(f"{source}: the checkpoint lacks {len(names)} tensors of its {what}, for example {names[0]}")

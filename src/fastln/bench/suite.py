"""What a suite of runs consists of, read from YAML and checked before anything is launched."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from fastln.errors import FastLNError

DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")


def _head_epochs() -> int:
    from fastln.training import TrainConfig  # here, since it brings torch and transformers with it

    return TrainConfig.head_epochs


@dataclass(frozen=True, slots=True)
class Suite:
    """One comparison: every method on every model, same data, batches, optimizer and dtype for all.

    `fastln.bench.suite.load_suite` makes one; `data`, `models` and `methods` have no default.
    """

    name: str
    data: str  # "phantom" or a folder
    models: tuple[str, ...]  # model specs, as `fastln.models.load_task` takes them
    methods: tuple[str, ...]  # "method/engine"
    batch_size: int = 32
    questions_per_image: int = 4  # of one image in one batch
    dtype: str = "auto"  # bfloat16 where the device has the units for it, float32 elsewhere
    device: str = "auto"  # cuda where there is one
    rounds: int = 3
    warmup_steps: int = 2
    steps: int = 5  # timed, in each round
    epochs: int = 0  # of training before the answers are counted; 0: accuracy is not measured
    head_epochs: int = dataclasses.field(default_factory=_head_epochs)  # before those, of a random head alone
    seed: int = 0
    timeout_seconds: float = 3600.0  # for one run; a run that takes longer is a row with an error

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The methods as (method, engine)."""
        return [(method, engine) for method, _, engine in (name.partition("/") for name in self.methods)]


def load_suite(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Suite:
    """Read a suite and check every value.

    Args:
        name: A suite that comes with fastln (`suite_names()`), or the path of a YAML file.
        overrides: Values that replace the file's, by field name; None means "as the file says".

    Raises:
        FastLNError: No such suite; malformed YAML; an unknown or missing key; a value of the wrong type or out of
            range; a method/engine pair that does not exist.
    """
    text, where = _read(str(name))
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise FastLNError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise FastLNError(f"{where}: a suite is a mapping of {', '.join(_fields())}; this is {type(values).__name__}")
    values = {"name": Path(name).stem, **values}
    values.update({key: value for key, value in (overrides or {}).items() if value is not None})
    return _checked(values, where)


def suite_names() -> list[str]:
    """The suites that come with fastln."""
    return sorted(Path(entry.name).stem for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def _folder() -> Any:
    return resources.files("fastln.bench") / "suites"


def _fields() -> list[str]:
    return [field.name for field in dataclasses.fields(Suite)]


def _read(name: str) -> tuple[str, str]:
    if name in suite_names():
        return (_folder() / f"{name}.yaml").read_text(), f"suite {name}"
    try:
        return Path(name).read_text(), name
    except (OSError, UnicodeDecodeError) as error:
        if name.endswith((".yaml", ".yml")):
            raise FastLNError(f"{name}: cannot read the suite: {error}") from error
        raise FastLNError(
            f"no suite called {name!r}{_nearest(name, suite_names())}: give one of {', '.join(suite_names())}, "
            "or the path of a YAML file"
        ) from error


def _nearest(name: str, choices: list[str]) -> str:
    near = get_close_matches(name, choices, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _checked(values: dict[str, Any], where: str) -> Suite:
    for key in values:
        if key not in _fields():
            near = _nearest(str(key), _fields())
            raise FastLNError(f"{where}: unknown key {key!r}{near}: a suite has {', '.join(_fields())}")
    missing = [
        field.name
        for field in dataclasses.fields(Suite)
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in values
    ]
    if missing:
        raise FastLNError(f"{where}: needs {', '.join(missing)}")
    for key in ("models", "methods"):
        if not isinstance(values[key], list | tuple) or not values[key]:
            raise FastLNError(f"{where}: {key} must be a list with at least one entry, not {values[key]!r}")
        values[key] = tuple(str(entry) for entry in values[key])
        if len(set(values[key])) < len(values[key]):
            raise FastLNError(f"{where}: {key} names the same entry twice: {', '.join(values[key])}")
    values["name"], values["data"] = str(values["name"]), str(values["data"])
    for key, smallest in _SMALLEST.items():
        value = values.get(key, smallest)
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            raise FastLNError(f"{where}: {key} must be a whole number of at least {smallest}, not {value!r}")
    if values.get("seed", 0) >= 2**32:  # transformers.set_seed, by way of numpy, takes no larger one
        raise FastLNError(f"{where}: seed must be less than 2**32 ({2**32}), not {values['seed']}")
    timeout = values.get("timeout_seconds", 1)
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout < math.inf:
        raise FastLNError(f"{where}: timeout_seconds must be a positive number of seconds, not {timeout!r}")
    for key, choices in (("dtype", DTYPES), ("device", DEVICES)):
        value = values.get(key, "auto")
        if value not in choices:
            near = _nearest(str(value), list(choices))
            raise FastLNError(f"{where}: unknown {key} {value!r}{near}: choose from {', '.join(choices)}")
    _check_methods(values["methods"], where)
    return Suite(**values)


_SMALLEST = {
    "batch_size": 1,
    "questions_per_image": 1,
    "rounds": 1,
    "warmup_steps": 0,
    "steps": 1,
    "epochs": 0,
    "head_epochs": 0,
    "seed": 0,
}


def _check_methods(names: tuple[str, ...], where: str) -> None:
    from fastln.methods import METHODS  # here, since it brings torch and transformers with it

    pairs = [f"{method.name}/{engine}" for method in METHODS.values() for engine in method.engines]
    for name in names:
        if name not in pairs:
            near = _nearest(name, pairs)
            raise FastLNError(f"{where}: unknown method/engine {name!r}{near}: choose from {', '.join(pairs)}")

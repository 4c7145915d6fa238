"""Definition of a suite of runs, read from YAML and checked before any run starts."""

import dataclasses
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fastln.errors import FastLNError
from fastln.files import expanded, user_path
from fastln.models.shapes import is_shape, parse_shape
from fastln.models.sources import expanded_sources
from fastln.reading import DataOptions, skip_limit

logger = logging.getLogger(__name__)

REAL_DATA = "$FASTLN_DATA"  # in a suite, stands for the folder in this environment variable
DTYPES = ("auto", "float32", "bfloat16")
PRODUCTS = ("exact", "int8")  # fastln.ops.settings.PRODUCTS, which takes torch to import
DEVICES = ("auto", "cpu", "cuda")
PEAKS = ("process", "allocator")
_TIMES = re.compile(r"(\d+(?:\.\d+)?|\.\d+)x")


def _head_epochs() -> int:
    from fastln.training import TrainConfig  # not at the top: it imports torch and transformers

    return TrainConfig.head_epochs


class Contender(NamedTuple):
    """What a row of a model runs.

    Attributes:
        method: A tuning method.
        engine: Who runs it.
        products: The form of fastln's matrix products.
        activations: What fastln's operations keep for backward.
        memory_budget: What fastln fits them to instead, as a suite names it; None for nothing.
        checkpointing: Whether stock code computes its layers again in the backward.
        compiled: The share of stock code's activations that torch.compile may keep; None if it is not compiled.
    """

    method: str
    engine: str
    products: str = "exact"
    activations: str = "exact"
    memory_budget: str | None = None
    checkpointing: bool = False
    compiled: float | None = None

    @property
    def words(self) -> list[str]:
        """What sets it apart from its method and engine as they usually run."""
        products, activations = ("" if name == "exact" else name for name in (self.products, self.activations))
        budget = f"budget {self.memory_budget}" if self.memory_budget else ""
        checkpointing = "checkpointing" if self.checkpointing else ""
        compiled = "" if self.compiled is None else f"compiled {self.compiled:g}"
        return [word for word in (products, activations, budget, checkpointing, compiled) if word]

    @property
    def has_own_storage(self) -> bool:
        """Whether it keeps something else for backward than its method and engine usually do."""
        return self._replace(products="exact") != Contender(self.method, self.engine)


@dataclass(frozen=True, slots=True)
class Suite:
    """One comparison: every method on every model, with the same data, batches, optimizer and dtypes for all.

    `load_suite` makes one. `models` and `methods` have no default. `data` is required unless every model is a shape.
    """

    name: str
    models: tuple[str, ...]  # specs that `fastln.models.load_task` takes, or shapes (`fastln.models.shapes`)
    methods: tuple[str, ...]  # "method/engine" or "method/engine/dtype"; LN-F-T has one code per sub-model
    data: str = ""  # "phantom" or a folder; shapes have random batches and need no data
    layout: str | None = None  # this and the next three: see `fastln.data.DataOptions`
    language: str | None = None
    skip_bad_rows: bool | int | str = False
    keep_repeats: bool = False
    image_size: int | None = None  # see `fastln.models.load_task`; not for shapes, whose spec has the size
    batch_size: int = 32  # ignored for shapes, whose spec has the batch size
    questions_per_image: int = 4  # per batch
    dtypes: tuple[str, ...] = ("auto",)  # auto: bfloat16 if the device has units for it, float32 otherwise
    products: tuple[str, ...] = ("exact",)  # a row of engine fastln for each; other engines run stock code
    activations: tuple[str, ...] = ("exact",)  # likewise a row of engine fastln for each
    memory_budgets: tuple[str, ...] = ()  # and one for each of these; "0.6x" of what exact storage takes beside weights
    checkpointing: bool = False  # a further row of each other engine, whose layers run again in the backward
    compile_budgets: tuple[float, ...] = ()  # and of engine torch for each share of activations to keep, compiled
    peak: str = "process"  # of memory; allocator: on a CPU what torch's allocator gives the timed steps
    device: str = "auto"  # auto: cuda if there is a GPU, cpu otherwise
    rounds: int = 3
    warmup_steps: int = 2
    steps: int = 5  # timed steps in each round
    epochs: int = 0  # of training before correct answers are counted; 0 measures no accuracy
    head_epochs: int = dataclasses.field(default_factory=_head_epochs)  # before those, for a random head alone
    seed: int = 0
    timeout_seconds: float = 3600.0  # per run; a run that takes longer becomes a row with an error

    @property
    def options(self) -> DataOptions:
        """The options for reading the data."""
        return DataOptions(self.layout, self.language, self.skip_bad_rows, self.keep_repeats)

    def contenders(self, dtype: str) -> list[Contender]:
        """Return the rows of one model in a dtype: each once, also if named twice."""
        rows = (
            row
            for method, engine, only in map(parts_of_method, self.methods)
            if only in ("", dtype)
            for row in (self._ours(method) if engine == "fastln" else self._stock(method, engine))
        )
        return list(dict.fromkeys(rows))

    def _ours(self, method: str) -> Iterator[Contender]:
        for products in self.products:
            for activations in self.activations:
                yield Contender(method, "fastln", products, activations)
            for budget in self.memory_budgets:
                yield Contender(method, "fastln", products, memory_budget=budget)

    def _stock(self, method: str, engine: str) -> Iterator[Contender]:
        yield Contender(method, engine)
        if self.checkpointing:
            yield Contender(method, engine, checkpointing=True)
        if engine == "torch":
            for share in self.compile_budgets:
                yield Contender(method, engine, compiled=share)


def parts_of_method(name: str) -> tuple[str, str, str]:
    """Split METHOD/ENGINE/DTYPE; the dtype is empty if the method runs in each."""
    method, engine, dtype, *_ = (*name.split("/", 2), "", "")
    return method, engine, dtype


def load_suite(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Suite:
    """Read a suite and check every value.

    Args:
        name: A suite that comes with fastln (`suite_names()`), or the path of a YAML file.
        overrides: Values that replace the file's, by field name. None keeps the file's value.

    Raises:
        FastLNError: If there is no such suite, the YAML is malformed, a key is unknown or missing, a value has the
            wrong type or is out of range, or a method/engine pair does not exist.
    """
    text, where = _read(str(name))
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise FastLNError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise FastLNError(
            f"{where}: a suite must be a mapping with keys from {', '.join(_fields())}, not a {type(values).__name__}"
        )
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    suite = _checked(_with_real_data({"name": Path(name).stem, **values, **given}), where)
    _tell_unused(suite, given if name in suite_names() else {**values, **given}, where)
    return suite


_OF_DATA = (
    *("data", "layout", "language", "skip_bad_rows", "questions_per_image", "batch_size", "epochs", "head_epochs"),
)


def _tell_unused(suite: Suite, given: Mapping[str, Any], where: str) -> None:
    """Log which keys that the user gave have no effect on any model of the suite."""
    usual = Suite("", (), ())
    changed = [key for key in given if getattr(suite, key) != getattr(usual, key)]
    engines = {parts_of_method(name)[1] for name in suite.methods}
    for key, needed, who in (
        ("products", {"fastln"}, "engine fastln"),
        ("activations", {"fastln"}, "engine fastln"),
        ("memory_budgets", {"fastln"}, "engine fastln"),
        ("checkpointing", {"torch", "peft"}, "stock code (engine torch or peft)"),
        ("compile_budgets", {"torch"}, "engine torch"),
    ):
        if key in changed and not engines & needed:
            logger.warning("%s: %s has no effect, as no method runs on %s", where, key, who)
    if all(is_shape(model) for model in suite.models):
        if unused := [key for key in changed if key in _OF_DATA]:
            logger.warning(
                "%s: no effect on shapes, which have random batches of their own size: %s", where, ", ".join(unused)
            )
    elif "head_epochs" in changed and not suite.epochs:
        logger.warning("%s: head_epochs has no effect without epochs, as nothing trains before it is timed", where)


def suite_names() -> list[str]:
    """Return the names of the suites that come with fastln."""
    return sorted(Path(entry.name).stem for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def _folder() -> Any:
    return resources.files("fastln.bench") / "suites"


def _with_real_data(values: dict[str, Any]) -> dict[str, Any]:
    """Replace `$FASTLN_DATA` in `data` and `models` by its value; if it is unset, drop the entries that use it."""
    folder, models = os.environ.get("FASTLN_DATA"), values.get("models")
    filled: dict[str, Any] = {}
    if REAL_DATA in str(values.get("data")):
        filled["data"] = values["data"].replace(REAL_DATA, folder) if folder else ""
    if isinstance(models, list | tuple):
        filled["models"] = []
        for model in map(str, models):
            if REAL_DATA in model and not folder:
                logger.info("skipping %s: set FASTLN_DATA to a folder with real data and models to include it", model)
            elif folder and (missing := _missing([model, values.get("data")], Path(folder))):
                logger.warning("skipping %s: FASTLN_DATA (%s) has no %s", model, folder, missing)
            else:
                filled["models"].append(model.replace(REAL_DATA, folder or ""))
    return values | filled


def _missing(names: list[Any], folder: Path) -> str | None:
    """Return the first part that a folder lacks of those that `$FASTLN_DATA/...` in a model and its data names.

    A folder that does not exist lacks nothing here: that is an error, which the models themselves raise.
    """
    if not folder.is_dir() or REAL_DATA not in names[0]:
        return None
    parts = [part for name in names for part in re.findall(re.escape(REAL_DATA) + r"/([^,]+)", str(name))]
    return next((part for part in parts if not (folder / part).exists()), None)


def _fields() -> list[str]:
    return [field.name for field in dataclasses.fields(Suite)]


def _read(name: str) -> tuple[str, str]:
    if name in suite_names():
        return (_folder() / f"{name}.yaml").read_text(encoding="utf-8"), f"suite {name}"
    try:
        return user_path(name).read_text(encoding="utf-8"), name
    except (OSError, UnicodeDecodeError) as error:
        if name.endswith((".yaml", ".yml")):
            raise FastLNError(f"{name}: cannot read the suite: {error}") from error
        raise FastLNError(
            f"no suite called {name!r}{_nearest(name, suite_names())}; give one of {', '.join(suite_names())}, "
            "or the path of a YAML file"
        ) from error


def _nearest(name: str, choices: list[str]) -> str:
    near = get_close_matches(name, choices, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _checked(values: dict[str, Any], where: str) -> Suite:
    for key in values:
        if key not in _fields():
            near = _nearest(str(key), _fields())
            raise FastLNError(f"{where}: unknown key {key!r}{near} (valid: {', '.join(_fields())})")
    missing = [
        field.name
        for field in dataclasses.fields(Suite)
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in values
    ]
    models = values.get("models")
    if not values.get("data") and not (isinstance(models, list | tuple) and all(is_shape(str(m)) for m in models)):
        missing.insert(0, "data")
    if missing:
        raise FastLNError(f"{where}: missing {', '.join(missing)}")
    for key in ("models", "methods", "dtypes", "products", "activations", "memory_budgets"):
        if key not in values:
            continue
        least = "" if key == "memory_budgets" else " with at least one entry"
        if not isinstance(values[key], list | tuple) or (least and not values[key]):
            raise FastLNError(f"{where}: {key} must be a list{least}, not {values[key]!r}")
        values[key] = tuple(str(entry) for entry in values[key])
        if len(set(values[key])) < len(values[key]):
            raise FastLNError(f"{where}: {key} has the same entry twice: {', '.join(values[key])}")
    for key in ("layout", "language"):
        if not isinstance(values.get(key), str | None):
            raise FastLNError(f"{where}: {key} must be a name, not {values[key]!r}")
    for key in ("keep_repeats", "checkpointing"):
        if not isinstance(values.get(key, False), bool):
            raise FastLNError(f"{where}: {key} must be true or false, not {values[key]!r}")
    shares = values.get("compile_budgets", ())
    if not isinstance(shares, list | tuple) or not all(_is_share(share) for share in shares):
        raise FastLNError(f"{where}: compile_budgets must be a list of numbers from 0 to 1, not {shares!r}")
    values["compile_budgets"] = tuple(map(float, shares))
    try:
        values["skip_bad_rows"] = skip_limit(values.get("skip_bad_rows", False))
    except FastLNError as error:
        raise FastLNError(f"{where}: {error}") from None
    size = values.get("image_size")
    if not isinstance(size, int | None) or isinstance(size, bool):
        raise FastLNError(f"{where}: image_size must be a whole number of pixels, not {size!r}")
    if size is not None and all(is_shape(model) for model in values["models"]):
        raise FastLNError(f"{where}: image_size does not apply to shapes; give the image size in the shape itself")
    values["models"] = tuple(map(expanded_sources, values["models"]))
    values["name"], values["data"] = str(values["name"]), expanded(str(values.get("data") or ""))
    for key, smallest in _SMALLEST.items():
        value = values.get(key, smallest)
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            raise FastLNError(f"{where}: {key} must be a whole number of at least {smallest}, not {value!r}")
    if values.get("seed", 0) >= 2**32:  # numpy's limit, which transformers.set_seed inherits
        raise FastLNError(f"{where}: seed must be less than 2**32 ({2**32}), not {values['seed']}")
    timeout = values.get("timeout_seconds", 1)
    if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout < math.inf:
        raise FastLNError(f"{where}: timeout_seconds must be a positive number of seconds, not {timeout!r}")
    named: list[tuple[str, Any, tuple[str, ...]]] = [("dtype", dtype, DTYPES) for dtype in values.get("dtypes", ())]
    named += [("products", name, PRODUCTS) for name in values.get("products", ())]
    if "activations" in values:
        from fastln.ops.settings import STORAGES  # not at the top: it imports torch

        named += [("activations", name, tuple(STORAGES)) for name in values["activations"]]
    named += [("peak", values.get("peak", "process"), PEAKS), ("device", values.get("device", "auto"), DEVICES)]
    for key, value, choices in named:
        if value not in choices:
            near = _nearest(str(value), list(choices))
            raise FastLNError(f"{where}: unknown {key} {value!r}{near}: choose from {', '.join(choices)}")
    for model in filter(is_shape, values["models"]):
        try:
            parse_shape(model)
        except FastLNError as error:
            raise FastLNError(f"{where}: {error}") from None
    for budget in values.get("memory_budgets", ()):
        _check_budget(budget, where)
    suite = Suite(**values)
    _check_methods(suite, where)
    return suite


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def times_exact(budget: str) -> float | None:
    """Return what a budget such as "0.6x" multiplies the memory of a step with exact storage by, beside the weights.

    None for other forms of budgets.
    """
    found = _TIMES.fullmatch(budget)
    return float(found[1]) if found else None


def _check_budget(budget: str, where: str) -> None:
    if (times := times_exact(budget)) is not None:
        if not times > 0:
            raise FastLNError(f"{where}: memory_budgets has {budget!r}, which leaves nothing beside the weights")
        return
    import torch  # not at the top: it takes a second

    from fastln.budget import settle_budget

    try:
        settle_budget(budget, torch.device("cpu"))
    except FastLNError as error:
        raise FastLNError(
            f"{where}: memory_budgets has {budget!r}, which is none; give a size such as 8GiB, a share of the device's "
            f"memory such as 0.5, or 0.6x for a share of what exact storage takes ({error})"
        ) from None


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


def _check_methods(suite: Suite, where: str) -> None:
    from fastln.methods import METHODS, get_method, is_notation  # not at the top: it imports torch and transformers

    pairs = [f"{method.name}/{engine}" for method in METHODS.values() for engine in method.engines]
    for name in suite.methods:
        method, engine, dtype = parts_of_method(name)
        if dtype == "auto":  # there is no row of it: it becomes one of the others
            raise FastLNError(f"{where}: {name} names no dtype: auto becomes float32 or bfloat16, so name one of these")
        if dtype and dtype not in suite.dtypes:
            raise FastLNError(f"{where}: {name} would never run: its dtype is not one of {', '.join(suite.dtypes)}")
        if is_notation(method) and engine in get_method(method)[0].engines:
            continue
        if f"{method}/{engine}" not in pairs:
            near = _nearest(name, pairs)
            raise FastLNError(
                f"{where}: unknown method/engine {name!r}{near}: choose from {', '.join(pairs)}, or give one code per "
                "sub-model, as in LN-F-T/fastln"
            )

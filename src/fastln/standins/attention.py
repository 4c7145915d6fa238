"""fastln's attention in transformers' models.

Most families ask transformers' attention interface, which looks a function up by the name in the configuration, at
every call. Importing this module adds the name "fastln" to the interface's functions. An attention module that is
switched gets a view of its configuration, which differs in that name alone; the configuration itself, which other
modules and other models may hold, stays as it is. So the model goes on to make the masks that sdpa takes.

On CUDA, flash-attn takes other masks. There every module of the model gets the view.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import TransformersKwargs, is_flash_attn_2_available

from fastln.ops import OpSettings
from fastln.ops.attention import attention, has_own
from fastln.ops.settings import DEFAULT

logger = logging.getLogger(__name__)

NAME = "fastln"
FLASH_ATTENTION = "flash_attention_2"

# What a module may pass on beside the arguments below without changing what sdpa computes: the mask says it already, or
# it is for other functions.
_HARMLESS = {*TransformersKwargs.__annotations__, "sliding_window", "deterministic", "use_cache", "cache_position"}
_told: set[str] = set()


def fast_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of its own sdpa function, with the same arguments and the same result.

    Args:
        module: The attention module; its `is_causal` counts where the argument is None.
        query: (B, H, Sq, D).
        key: (B, Hk, Sk, D).
        value: (B, Hk, Sk, D).
        attention_mask: Boolean or additive, broadcastable to (B, H, Sq, Sk), or None.
        dropout: Probability to drop an attention weight.
        scaling: Factor on the scores, 1/sqrt(D) by default.
        is_causal: Whether query i sees keys 0..i only, when there is no mask.
        kwargs: What else the module passes on. With anything that may change the result, sdpa computes it.

    Returns:
        The output (B, Sq, H, D), contiguous, and None for the attention weights.
    """
    settings = getattr(module.config, "_fastln_settings", DEFAULT)
    if _uses_more_than(kwargs) or not has_own(
        query, key, value, mask=attention_mask, dropout=dropout, settings=settings
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    n_queries = query.shape[2]
    causal = is_causal and attention_mask is None and n_queries > 1
    if causal:  # an empty static cache is longer than the queries
        key, value = key[:, :, :n_queries], value[:, :, :n_queries]
    out = attention(
        query, key, value, scale=scaling, causal=causal, mask=attention_mask, dropout=dropout, settings=settings
    )
    return out.transpose(1, 2).contiguous(), None


def _uses_more_than(kwargs: dict[str, Any]) -> bool:
    """Whether a module passes on something that may change the result: sdpa knows it, or refuses it with its reason."""
    unknown = [name for name, value in kwargs.items() if value is not None and name not in _HARMLESS]
    for name in unknown:
        if name not in _told:
            _told.add(name)
            logger.info("attention that gets %r runs on torch's own kernels: fastln's do not know this argument", name)
    return bool(unknown) or bool(kwargs.get("output_attentions"))


AttentionInterface.register(NAME, fast_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass(frozen=True)
class ViewSpec:
    """How a view of a configuration differs from the configuration.

    Attributes:
        name: What attention that is "sdpa" is called in it.
        inner: The configurations inside it that are seen through views of their own, by key.
    """

    name: str = "sdpa"
    inner: tuple[tuple[str, ViewSpec], ...] = ()


class _View:
    """A configuration under which attention has another name, beside the original, whose every attribute it shares.

    What is written to one is read from the other. Where the name is set to something else than "sdpa" later, by the
    user, that is the name.
    """

    _fastln_original: PreTrainedConfig
    _fastln_spec: ViewSpec
    _fastln_settings: OpSettings

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Do nothing: the classes of configurations would make a dataclass of each."""

    @property
    def _attn_implementation(self) -> str | None:
        name: str | None = self._fastln_original._attn_implementation
        return self._fastln_spec.name if name == "sdpa" else name

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self._fastln_original._attn_implementation = value

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return view_of, (self._fastln_original, self._fastln_spec, self._fastln_settings)


def view_of(config: PreTrainedConfig, spec: ViewSpec, settings: OpSettings = DEFAULT) -> PreTrainedConfig:
    """Return a view of `config` in which attention that is "sdpa" has another name.

    Args:
        config: The configuration; it stays as it is. The view shares its attributes.
        spec: What is different in the view.
        settings: How fastln's operations run.
    """
    cls = type(config)
    namespace: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_fastln_original": config,
        "_fastln_spec": spec,
        "_fastln_settings": settings,
    }
    for key, inner in spec.inner:
        namespace[key] = _inner_view(key, view_of(vars(config)[key], inner, settings))
    made: PreTrainedConfig = object.__new__(type(cls.__name__, (_View, cls), namespace))
    made.__dict__ = config.__dict__
    return made


def _inner_view(key: str, view: Any) -> property:
    def get(outer: Any) -> Any:
        held = vars(outer)[key]
        return view if held is view._fastln_original else held

    def put(outer: Any, value: Any) -> None:
        vars(outer)[key] = value

    return property(get, put)


@dataclass
class AttentionSwitch:
    """Gives a module a view of its configuration, and takes it away.

    Attributes:
        module: It holds the configuration as `config`.
        original: That configuration.
    """

    module: nn.Module
    original: PreTrainedConfig

    def put(self, spec: ViewSpec, settings: OpSettings) -> None:
        """Give the module the view."""
        self.module.config = view_of(self.original, spec, settings)

    def remove(self) -> None:
        """Give the module its own configuration back, unless it has got another one since."""
        held = vars(self.module).get("config")
        if isinstance(held, _View) and held._fastln_original is self.original:
            self.module.config = self.original


def flash_views(model: nn.Module, kept: Iterable[str]) -> dict[str, ViewSpec]:
    """Return the views under which flash-attn computes the attention of a model on a GPU, by module.

    A model takes flash-attn where it is installed, the model's dtype has 16 bits, its class supports it, and its
    attention is sdpa. Masks are made by the model, and by models around it, so all of them get views.

    Args:
        model: The model.
        kept: Names of attention modules that must keep their own way.
    """
    if not is_flash_attn_2_available():
        return {}
    fixed = {id(module.config) for name in kept if hasattr(module := model.get_submodule(name), "config")}
    switched = {
        id(part.config)
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
        and part.dtype.itemsize == 2
        and part._supports_flash_attn
        and part.config._attn_implementation == "sdpa"
        and id(part.config) not in fixed
    }
    views = {}
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and (spec := _flash_spec(config, switched)) != ViewSpec():
            views[name] = spec
    return views


def _flash_spec(config: PreTrainedConfig, switched: set[int]) -> ViewSpec:
    inner = {key: _flash_spec(value, switched) for key, value in vars(config).items() if _is_config(value)}
    name = FLASH_ATTENTION if id(config) in switched else "sdpa"
    return ViewSpec(name, tuple((key, spec) for key, spec in inner.items() if spec != ViewSpec()))


def _is_config(value: object) -> bool:
    return isinstance(value, PreTrainedConfig)

"""fastln's attention in transformers models.

Most families use transformers' attention interface: at every call it looks up a function by the name in the
configuration. Importing this module registers the name "fastln" with the interface. To switch an attention module,
fastln gives it a view of its configuration that differs only in that name. The configuration itself does not change,
because other modules and other models may share it. So the model keeps making masks for sdpa.

flash-attn, on CUDA, needs different masks. There every module of the model gets the view.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import TransformersKwargs, is_flash_attn_2_available

from fastln.ops import OpSettings
from fastln.ops.again import without
from fastln.ops.attention import attention, has_own
from fastln.ops.rounded import Reader
from fastln.ops.settings import DEFAULT

logger = logging.getLogger(__name__)

NAME = "fastln"
FLASH_ATTENTION = "flash_attention_2"

# Further arguments that do not change what sdpa computes: the mask already contains them, or they are meant for other
# functions.
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
    """Compute attention in place of transformers' sdpa function, with the same arguments and results.

    Args:
        module: The attention module. Its `is_causal` applies if the argument is None.
        query: (B, H, Sq, D).
        key: (B, Hk, Sk, D).
        value: (B, Hk, Sk, D).
        attention_mask: Boolean or additive, broadcastable to (B, H, Sq, Sk), or None.
        dropout: Probability to drop an attention weight.
        scaling: Factor on the scores, 1/sqrt(D) by default.
        is_causal: Whether query i sees only keys 0..i, if there is no mask.
        kwargs: Further arguments from the module. If one of them may change the result, sdpa computes it.

    Returns:
        The output (B, Sq, H, D), contiguous, and None for the attention weights.
    """
    settings = getattr(module.config, "_fastln_settings", DEFAULT)
    if _uses_more_than(kwargs) or not has_own(
        query, key, value, mask=attention_mask, dropout=dropout, settings=settings
    ):
        with without(query, key, value) if settings.keeps.again else nullcontext():
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
            )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    n_queries = query.shape[2]
    causal = is_causal and attention_mask is None and n_queries > 1
    if causal and key.shape[2] > n_queries:  # an empty static cache has more keys than there are queries
        key, value = key[:, :, :n_queries], value[:, :, :n_queries]
    out = attention(
        query,
        key,
        value,
        scale=scaling,
        causal=causal,
        mask=attention_mask,
        dropout=dropout,
        settings=settings,
        reader=getattr(module.config, "_fastln_reader", None),
    )
    return out.transpose(1, 2).contiguous(), None


def _uses_more_than(kwargs: dict[str, Any]) -> bool:
    """Whether a module passes an argument that may change the result. sdpa then handles or rejects it."""
    unknown = [name for name, value in kwargs.items() if value is not None and name not in _HARMLESS]
    for name in unknown:
        if name not in _told:
            _told.add(name)
            logger.info("attention with argument %r runs on torch's kernels: fastln's kernels do not support it", name)
    return bool(unknown) or bool(kwargs.get("output_attentions"))


AttentionInterface.register(NAME, fast_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass(frozen=True)
class ViewSpec:
    """How a view of a configuration differs from the configuration.

    Attributes:
        name: The name that replaces "sdpa" as the attention implementation.
        inner: The inner configurations that get their own views, by key.
    """

    name: str = "sdpa"
    inner: tuple[tuple[str, ViewSpec], ...] = ()


class View:
    """A view of a configuration that changes the attention name. It shares all attributes with the original.

    A write to one shows in the other. If the user later sets the name to something other than "sdpa", the view returns
    that name.
    """

    _fastln_original: PreTrainedConfig
    _fastln_spec: ViewSpec
    _fastln_settings: OpSettings
    _fastln_reader: Reader

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Do nothing. The configuration classes would otherwise turn each subclass into a dataclass."""

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
    """Return a view of `config` in which the attention name "sdpa" is replaced.

    Args:
        config: The configuration. It does not change; the view shares its attributes.
        spec: How the view differs.
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
        "_fastln_reader": Reader(),
    }
    for key, inner in spec.inner:
        namespace[key] = _inner_view(key, view_of(vars(config)[key], inner, settings))
    made: PreTrainedConfig = object.__new__(type(cls.__name__, (View, cls), namespace))
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
    """Gives a module a view of its configuration, and can take it away again.

    Attributes:
        module: The module. Its attribute `config` holds the configuration.
        original: The original configuration.
    """

    module: nn.Module
    original: PreTrainedConfig

    def put(self, spec: ViewSpec, settings: OpSettings) -> None:
        """Give the module the view."""
        self.module.config = view_of(self.original, spec, settings)

    def remove(self) -> None:
        """Give the module its own configuration back, unless someone has replaced the view since."""
        held = vars(self.module).get("config")
        if isinstance(held, View) and held._fastln_original is self.original:
            self.module.config = self.original


def flash_views(model: nn.Module, kept: Iterable[str]) -> dict[str, ViewSpec]:
    """Return the configuration views that switch a model on a GPU to flash-attn, by module name.

    A model can use flash-attn if the package is installed, the model's dtype has 16 bits, its class supports it, and
    its attention is sdpa. The model and the models around it make the masks, so all of them get views.

    Args:
        model: The model.
        kept: Names of attention modules that must stay unchanged.
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

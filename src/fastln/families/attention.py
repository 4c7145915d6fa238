"""Find the modules that compute attention, through transformers' attention interface or with their own code.

In most families each call looks up a function in the interface, `ALL_ATTENTION_FUNCTIONS`, by the name in the module's
configuration. A new name gives such a module another function, if nothing else in its code depends on the name. Some
code does: families with sparse attention build their mask only for the names "eager" and "sdpa".
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

from fastln.families.parts import outermost_attention

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_NAMES = ("_attn_implementation", "_attn_implementation_internal")
_BLIP = {BlipAttention: "blip_attention", BlipTextSelfAttention: "blip_text_attention"}


@dataclass(frozen=True)
class Attention:
    """A module that computes attention.

    Attributes:
        name: Its name in the model.
        what: "attention" if it uses the interface, or the name of the stand-in for its class.
        obstacle: Why fastln must not change it; None if it may.
    """

    name: str
    what: str
    obstacle: str | None = None


def find_attention(model: nn.Module) -> Iterator[Attention]:
    """Yield every module of `model` that computes attention, in the model's order."""
    asking = {name: module for name, module in model.named_modules() if _asks_interface(module)}
    served = {name for name, module in model.named_modules() if type(module) in _BLIP} | asking.keys()
    own = {name for name in outermost_attention(model) if not _holds(name, served)}
    for name, module in model.named_modules():
        if type(module) in _BLIP:
            yield Attention(name, _BLIP[type(module)])
        elif name in asking:
            yield Attention(name, "attention", _obstacle(module))
        elif name in own:
            yield Attention(name, "attention", "it computes attention with its own code")


def depends_on_name(cls: type[nn.Module]) -> str | None:
    """Say which code of a class depends on the attention name being "sdpa"; None if no code does.

    Two uses of the name are harmless: to look up a function in the interface, and to compare it with names other than
    "sdpa". Such a comparison has the same result for "sdpa" and for a new name.

    Args:
        cls: A module's class. Its bases are checked too, up to torch's classes.
    """
    for base in cls.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            break
        if (found := _depends_on_name(base)) is not None:
            return found
    return None


@functools.cache
def _depends_on_name(cls: type[nn.Module]) -> str | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return f"the source of {cls.__name__} cannot be read"
    harmless: set[ast.AST] = set()
    for node in ast.walk(tree):
        if (
            (isinstance(node, ast.Call) and _is_interface(node.func))
            or (isinstance(node, ast.Subscript) and _is_interface(node.value))
            or (isinstance(node, ast.Compare) and _compares_other_names(node))
        ):
            harmless |= set(ast.walk(node))
    for node in ast.walk(tree):
        named = (isinstance(node, ast.Attribute) and node.attr in _NAMES) or (
            isinstance(node, ast.Constant) and node.value in _NAMES
        )
        if named and node not in harmless:
            return f"the code of {cls.__name__} depends on the attention name sdpa"
    return None


_FIXED = (ast.Constant, ast.Tuple, ast.List, ast.Set, ast.expr_context)


def _is_interface(node: ast.AST) -> bool:
    return any(isinstance(inner, ast.Name) and inner.id == INTERFACE for inner in ast.walk(node))


def _compares_other_names(node: ast.Compare) -> bool:
    """Whether the name is compared only with constants, none of which is "sdpa"."""
    constants = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant)]
    others = [side for side in (node.left, *node.comparators) if not isinstance(side, ast.Attribute)]
    fixed = all(isinstance(inner, _FIXED) for side in others for inner in ast.walk(side))
    return fixed and bool(constants) and "sdpa" not in constants


def _asks_interface(module: nn.Module) -> bool:
    if isinstance(module, PreTrainedModel) or not isinstance(vars(module).get("config"), PreTrainedConfig):
        return False
    forward = inspect.unwrap(type(module).forward)
    return INTERFACE in getattr(getattr(forward, "__code__", None), "co_names", ())


def _obstacle(module: nn.Module) -> str | None:
    name = module.config._attn_implementation  # type: ignore[union-attr]
    if name != "sdpa":
        return f"its attention is set to {name!r}"
    if AttentionInterface()["sdpa"] is not sdpa_attention_forward:
        return "another function is registered as sdpa"
    return depends_on_name(type(module))


def _holds(name: str, others: set[str]) -> bool:
    return any(other == name or other.startswith(f"{name}.") for other in others)

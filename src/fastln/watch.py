"""Watches trained norms: they must get gradients, move and stay finite. Nothing else would show if they did not."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastln.errors import FastLNError
from fastln.methods import norm_parameters
from fastln.processes import gathered

logger = logging.getLogger(__name__)

PATIENCE = 3  # steps with a gradient after which a parameter must have moved
STRETCH = 50  # steps in which a parameter must have had a gradient at least once
LEAST_RATE = 1e-5  # below it, a float32 γ of 1 may need many steps to change


def watch_norms(model: nn.Module, *optimizers: torch.optim.Optimizer) -> NormWatch:
    """Watch the trained norms of a training loop of your own; `FastLNTrainer` does it by itself.

        model = fastln.prepare(model)
        optimizer = torch.optim.AdamW(...)
        watch = fastln.watch_norms(model, optimizer)

    From then on `optimizer.step()` raises a `FastLNError` if a norm gets gradients but does not move, if no norm at all
    gets a gradient in `STRETCH` steps, or if a norm becomes NaN. A warning names single norms without a gradient. Call
    `watch.finish()` after a short training, and `watch.remove()` to stop watching.

    Args:
        model: The model, as it will train, before its first step.
        *optimizers: Everything that steps its norms.

    Raises:
        FastLNError: If no norm of the model trains, or no optimizer is given.
    """
    watch = NormWatch(model)
    if not watch.parameters:
        raise FastLNError("no norm of this model trains, so there is nothing to watch")
    if not optimizers:
        raise FastLNError("watch_norms needs the optimizers that step the norms: watch_norms(model, optimizer)")
    watch.attach(*optimizers)
    return watch


class NormWatch:
    """Raises an error when a trained norm does not move, and measures how far norms moved.

    A parameter does not move if every element still has its initial value after `PATIENCE` steps that had a gradient
    other than 0, at a rate of `LEAST_RATE` or more. That happens to a norm in bfloat16 whose steps all round to zero,
    and to a norm that no optimizer has. Steps without a gradient do not count: a layer may be dropped in some steps
    (LayerDrop), or a batch may have no image.

    FSDP2 may shard the model after the watch has started; all processes then see the same.

    Args:
        model: The model that trains, before its first step.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = [name for name in norm_parameters(model) if model.get_parameter(name).requires_grad]
        places = [name.rpartition(".") for name in trained]
        self._norms = {
            name: (model.get_submodule(norm), own) for name, (norm, _, own) in zip(trained, places, strict=True)
        }
        self.start = {name: gathered(parameter).clone() for name, parameter in self.parameters.items()}
        self.n_steps = 0
        self._without_gradient = dict.fromkeys(self.parameters)  # a set in the model's order
        self._only_zeros: dict[str, None] = {}  # had gradients, all of them 0
        self._unmoved = dict.fromkeys(self.parameters, 0)  # steps that should have moved it
        self._optimizers: tuple[torch.optim.Optimizer, ...] = ()
        self._handles: list[Any] = []

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The current parameters of trained norms; sharding replaces them."""
        return {name: getattr(norm, own) for name, (norm, own) in self._norms.items()}

    @property
    def began_finite(self) -> dict[str, nn.Parameter]:
        """Those of `parameters` that were finite when the watch started."""
        return {name: p for name, p in self.parameters.items() if self.start[name].isfinite().all()}

    def attach(self, *optimizers: torch.optim.Optimizer) -> None:
        """Look at every step of these optimizers. A step that loss scaling skips does not count."""
        self.remove()
        self._optimizers = optimizers
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def remove(self) -> None:
        """Stop watching. What was seen so far stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def finish(self) -> None:
        """Warn of norms that got no gradient in a training of fewer than `STRETCH` steps."""
        if 0 < self.n_steps < STRETCH and (complaint := self._complaint()):
            logger.warning("%s", complaint)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        pending = self._without_gradient.keys() | self._only_zeros.keys() | self._unmoved.keys()
        if not pending:
            return
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        elsewhere = {id(p) for other in self._optimizers for group in other.param_groups for p in group["params"]}
        for name, parameter in self.parameters.items():
            if name not in pending or parameter.grad is None:
                continue
            if id(parameter) not in rates and (id(parameter) in elsewhere or optimizer is not self._optimizers[0]):
                continue  # another optimizer's step judges it
            self._without_gradient.pop(name, None)
            if not gathered(parameter.grad).any():
                if name in self._unmoved and not self._unmoved[name]:
                    self._only_zeros[name] = None
                continue
            self._only_zeros.pop(name, None)
            if name in self._unmoved and rates.get(id(parameter), LEAST_RATE) >= LEAST_RATE:
                self._unmoved[name] += 1

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        parameters = self.parameters
        for name in [name for name, n_steps in self._unmoved.items() if n_steps]:
            moved = not torch.equal(*self._now_and_then(name, parameters[name]))
            if moved or self._moved_in_float32(name, parameters[name]):
                del self._unmoved[name]
        if stuck := [name for name, n_steps in self._unmoved.items() if n_steps >= PATIENCE]:
            raise FastLNError(self._why_stuck(stuck))
        if optimizer is not self._optimizers[0]:
            return
        self.n_steps += 1
        if self.n_steps % STRETCH == 0:
            check_finite(self.began_finite, self.n_steps)
        if self.n_steps == STRETCH and (complaint := self._complaint()):
            if len(self._without_gradient | self._only_zeros) == len(parameters):
                raise FastLNError(complaint)
            logger.warning("%s", complaint)

    def _moved_in_float32(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether an optimizer keeps a float32 copy that moved, by steps that the parameter's dtype rounds away."""
        copies = [optimizer.state.get(parameter, {}).get("master") for optimizer in self._optimizers]
        return any(not torch.equal(c, self.start[name].to(c.device, c.dtype)) for c in copies if c is not None)

    def _why_stuck(self, names: list[str]) -> str:
        held = {id(p) for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}
        parameters = self.parameters
        missing = [name for name in names if id(parameters[name]) not in held]
        narrow = [name for name in names if parameters[name].dtype != torch.float32]
        shown = missing or narrow or names
        dtypes = ", ".join(sorted({str(parameters[name].dtype).removeprefix("torch.") for name in shown}))
        if missing:
            why = "the optimizer does not have them"
        elif narrow:
            why = f"{dtypes} rounds their steps away: cast the model before fastln.prepare(), which keeps float32 norms"
        else:
            why = "their steps are smaller than float32 resolves; try a higher learning rate"
        return f"{_some(shown)} ({dtypes}) did not move in {PATIENCE} optimizer steps with a gradient: {why}"

    def _complaint(self) -> str | None:
        """Say which norms never had a gradient, or only zeros; None if all had one."""
        parts = []
        if silent := list(self._without_gradient):
            parts.append(
                f"{len(silent)} of {len(self._norms)} trained norm parameters received no gradient in {self.n_steps} "
                f"steps, so the loss may not depend on them: {_some(silent)}"
            )
        if zeros := list(self._only_zeros):
            everywhere = len(zeros) == len(self._norms)
            why = ": the loss does not change with them, as in data with one answer only" if everywhere else ""
            parts.append(
                f"{len(zeros)} of {len(self._norms)} trained norm parameters received only gradients of 0 in "
                f"{self.n_steps} steps{why}: {_some(zeros)}"
            )
        if not parts:
            return None
        example = (silent or zeros)[0].rpartition(".")[0]
        return f"{'; '.join(parts)}; leave norms out by name or pattern: scope='not:{example}'"

    def gamma_shift(self) -> float | None:
        """Return the mean |γ - initial γ| over all elements of trained norms; None if no γ trains."""
        pairs = (
            self._now_and_then(name, parameter)
            for name, parameter in self.parameters.items()
            if name.endswith(".weight")
        )
        shifts = [(now.float() - then.float()).abs().flatten() for now, then in pairs]
        return torch.cat(shifts).mean().item() if shifts else None

    def _now_and_then(self, name: str, parameter: Tensor) -> tuple[Tensor, Tensor]:
        now = gathered(parameter)
        if self.start[name].device != now.device:
            self.start[name] = self.start[name].to(now.device)
        return now, self.start[name]


def check_finite(parameters: Mapping[str, Tensor], step: int) -> None:
    """Check that parameters are finite; with several processes, all must call this, and all raise.

    Raises:
        FastLNError: naming the parameters that are not.
    """
    broken = [name for name, parameter in parameters.items() if not gathered(parameter).isfinite().all()]
    if broken:
        raise FastLNError(f"{_some(broken)} turned NaN or infinite by step {step}; try a lower learning rate")


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return f"{', '.join(shown[:5])}{f' and {len(shown) - 5} more' if len(shown) > 5 else ''}"

"""AdamW with float32 copies of low-precision parameters, and its groups for tuning norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_cosine_schedule_with_warmup

from fastln.adapters import PEFT_PREFIX
from fastln.methods import LearningRates, norm_parameters

WEIGHT_DECAY = 0.01


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) whose state and arithmetic are float32 for every parameter.

    A parameter of lower precision has a float32 copy in the optimizer's state; the copy takes the steps, and the
    parameter is that copy, rounded. So steps that are too small for bfloat16 add up instead of getting lost. Each group
    takes its step in one call of torch's fused kernel.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = WEIGHT_DECAY,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; parameters without a gradient do not change.

        Args:
            closure: recomputes the loss, as torch's optimizers allow.

        Returns:
            What `closure` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        states = [self._state_of(parameter) for parameter in parameters]
        beta1, beta2 = group["betas"]
        # One kernel for all. It reads memory in order and ignores strides, so all its arguments must be contiguous.
        adamw(
            [state.get("master", parameter) for state, parameter in zip(states, parameters, strict=True)],
            [parameter.grad.float().contiguous() for parameter in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for state, parameter in zip(states, parameters, strict=True):
            if "master" in state:
                parameter.copy_(state["master"])

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            if parameter.dtype != torch.float32 or not parameter.is_contiguous():
                state["master"] = parameter.detach().float().contiguous()
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(state.get("master", parameter), memory_format=torch.contiguous_format)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned, in float32: the base class would round it to the parameters' dtype."""
        super().load_state_dict(state_dict)
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, parameter in zip(ids, parameters, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, torch.float32, copy=True)


def cosine_schedule(optimizer: torch.optim.Optimizer, n_steps: int, warmup: float) -> LambdaLR:
    """Return a schedule: rates rise over the fraction `warmup` of the steps, then fall to 0 along a cosine."""
    return get_cosine_schedule_with_warmup(optimizer, math.ceil(warmup * n_steps), n_steps)


def parameter_groups(
    model: nn.Module, head: Iterable[str], rates: LearningRates, *, weight_decay: float = WEIGHT_DECAY
) -> list[dict[str, Any]]:
    """Group the trained parameters: the task head's, norms, and the method's others, each with and without decay.

    Norms and biases never decay: pulling γ towards 0 undoes the pretrained model.

    Args:
        model: the module to train.
        head: names of the modules that train as a task head (also inside peft's wrappers).
        rates: the rates of the three groups.
        weight_decay: weight decay of matrices.

    Returns:
        Parameter groups for an optimizer, empty ones left out.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter, rate, decays in _trained(model, head):
        groups.setdefault((getattr(rates, rate), decays), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": weight_decay if decays else 0.0}
        for (rate, decays), parameters in groups.items()
    ]


def rates_in_use(model: nn.Module, head: Iterable[str], rates: LearningRates) -> dict[str, float]:
    """Return the rates of the groups of `parameter_groups` that train: of `norms`, `own` (the method's) and `head`."""
    return rates.of({rate for _, rate, _ in _trained(model, head)})


def describe_rates(rates: Mapping[str, float]) -> str:
    """Describe, in one line, what `rates_in_use` returned."""
    names = {
        "norms": "norms",
        "own": "the method's others" if "norms" in rates else "the method's",
        "head": "task head",
    }
    return f"learning rates at their highest: {', '.join(f'{names[group]} {rate:g}' for group, rate in rates.items())}"


def decays(model: nn.Module, head: Iterable[str]) -> bool:
    """Whether weight decay reaches any parameter that trains."""
    return any(is_matrix for _, _, is_matrix in _trained(model, head))


def _trained(model: nn.Module, head: Iterable[str]) -> Iterator[tuple[nn.Parameter, str, bool]]:
    """Yield each parameter that trains, the name of its rate in `LearningRates`, and whether it decays."""
    norms = set(norm_parameters(model))
    prefixes = tuple(f"{name}." for name in head)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_head = name.removeprefix(PEFT_PREFIX).startswith(prefixes)
            is_norm = name in norms
            yield parameter, "head" if in_head else "norms" if is_norm else "own", parameter.dim() > 1 and not is_norm

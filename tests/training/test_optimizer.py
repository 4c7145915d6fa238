"""AdamW with float32 copies: torch's numbers in float32, no lost steps below it, and exact resumption."""

import copy

import pytest
import tiny
import torch
from torch import nn

from fastln.methods import HEAD_LEARNING_RATE, METHODS, get_method, learning_rates
from fastln.training import MasterAdamW, TrainConfig, build_optimizer, parameter_groups
from fastln.training.tasks import apply_method


def walk(optimizer, parameters, n_steps=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((3, 4), (7,), ())]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_in_float32_it_is_adamw(weight_decay):
    ours, theirs = parameters(), parameters()
    walk(MasterAdamW(ours, lr=1e-2, weight_decay=weight_decay), ours)
    walk(torch.optim.AdamW(theirs, lr=1e-2, weight_decay=weight_decay), theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


LAYOUTS = {
    "contiguous": torch.clone,
    "transposed": lambda t: t.T.contiguous().T,
    "every other column": lambda t: torch.stack((t, t), -1)[..., 0],
}


@pytest.mark.parametrize("gradient", LAYOUTS)
@pytest.mark.parametrize("parameter", LAYOUTS)
def test_any_strides(parameter, gradient):
    """torch's fused kernel takes no notice of them."""
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    ours, theirs = nn.Parameter(LAYOUTS[parameter](values)), nn.Parameter(values)
    optimizer, reference = MasterAdamW([ours], lr=1e-2), torch.optim.AdamW([theirs], lr=1e-2)
    for seed in range(3):
        theirs.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        ours.grad = LAYOUTS[gradient](theirs.grad)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, check_stride=False)


def test_bfloat16_parameters_follow_their_float32_copies():
    low, high = parameters(torch.bfloat16), [nn.Parameter(p.detach().float()) for p in parameters(torch.bfloat16)]
    optimizer = MasterAdamW(low, lr=1e-4)
    walk(optimizer, low, n_steps=50)
    reference = MasterAdamW(high, lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        for parameter in high:
            parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16().float()
        reference.step()
    for one, other in zip(low, high, strict=True):
        assert torch.equal(optimizer.state[one]["master"], other)
        assert torch.equal(one, other.bfloat16())


def test_a_parameter_without_a_gradient_stays_and_its_bias_correction_waits():
    first, second = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = MasterAdamW([first, second], lr=0.1, weight_decay=0.0)
    first.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(second, torch.ones(2))
    second.grad = torch.ones(2)
    optimizer.step()
    # Adam's first step is the learning rate, whenever it comes.
    torch.testing.assert_close(second.detach(), torch.full((2,), 0.9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_from_its_state_it_goes_on_bit_for_bit(dtype):
    straight = parameters(dtype)
    optimizer = MasterAdamW(straight, lr=1e-3)
    walk(optimizer, straight)
    resumed = [nn.Parameter(parameter.detach().clone()) for parameter in straight]
    state = copy.deepcopy(optimizer.state_dict())
    again = MasterAdamW(resumed, lr=1e-3)
    again.load_state_dict(state)
    walk(optimizer, straight, seed=3)
    walk(again, resumed, seed=3)
    assert all(torch.equal(one, other) for one, other in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("method", [*(m for m in METHODS if m not in ("prefix", "p-tuning", "prompt")), "LN-T"])
def test_groups_hold_all_that_trains_once_and_norms_never_decay(method, tmp_path):
    task = tiny.dual(tmp_path, tiny.phantom())
    model = apply_method(task, method)
    groups = parameter_groups(model, task.head_under(method), learning_rates(method), weight_decay=0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    for group in groups:
        decays = {parameter.dim() > 1 for parameter in group["params"]}
        assert decays == {group["weight_decay"] > 0}
    rates = {group["lr"] for group in groups}
    chosen = get_method(method)[0]
    assert rates == {chosen.learning_rate, chosen.norm_learning_rate or chosen.learning_rate, HEAD_LEARNING_RATE}


@pytest.mark.parametrize("method", ["full", "LN-F-T", "head"])
def test_a_pretrained_head_has_the_rate_of_the_method(method, tmp_path):
    task = tiny.blip(tmp_path, tiny.phantom())
    config = TrainConfig(method, head_learning_rate=7.0)
    optimizer = build_optimizer(apply_method(task, method), task, config)
    rates = {
        group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
        if any(parameter is own for own in task.model.text_decoder.cls.parameters())
    }
    assert config.rates.own in rates
    assert rates <= {config.rates.own, config.rates.norms}  # its own norm is one like every other

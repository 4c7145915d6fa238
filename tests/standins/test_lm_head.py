"""Language-model heads of whole models, lazy against stock: losses, all gradients, and no logits but the labels'."""

import copy

import pytest
import torch
import transformers
from family_models import MODELS, N_CLASSES, N_TOKENS, batch, make
from only import prepare_only
from tiny import blip_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

import fastln
from fastln.late.logits import LazyLogits
from fastln.standins.lm_head import LMHead


def step(model, inputs, **settings):
    """Return the outputs, and the loss and all gradients."""
    model.zero_grad()
    outputs = model(**inputs, **settings)
    loss = outputs.loss
    if hasattr(outputs, "mc_loss"):
        loss = loss + outputs.mc_loss
    loss.backward()
    return outputs, {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


class Logits(TorchDispatchMode):
    """Records the most rows of any tensor whose last dimension is the classes'; a transposed weight is none."""

    n_rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor) and not x.is_meta and x.shape[-1:] == (N_CLASSES,) and x.stride(-1) == 1:
                self.n_rows = max(self.n_rows, x.numel() // N_CLASSES)
        return result


def check(got, want):
    assert got.keys() == want.keys()
    for name, expected in want.items():
        error = (got[name].double() - expected).norm() / expected.double().norm().clamp_min(1e-12)
        assert error < 1e-5 or (got[name] - expected).abs().max() < 1e-9, name


@pytest.mark.slow(take=12)
@pytest.mark.parametrize("trains", ["all", "norms"])
@pytest.mark.parametrize("name", MODELS)
def test_families(name, trains):
    model, inputs = make(name), batch(name)
    for parameter in model.parameters():
        parameter.requires_grad_(trains == "all" or parameter.ndim == 1)
    keys, parameters = list(model.state_dict()), {n: id(p) for n, p in model.named_parameters()}
    with Logits() as made:
        stock_outputs, want = step(model, inputs)
    assert made.n_rows >= N_TOKENS - 2

    prepare_only(model, "late_logits")
    assert sum(isinstance(module, LMHead) for module in model.modules()) == 1
    assert list(model.state_dict()) == keys
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    with Logits() as made:
        outputs, got = step(model, inputs)
    assert 0 < made.n_rows <= 4
    check(got, want)
    logits = {k: v for k, v in outputs.items() if isinstance(v, LazyLogits)}
    assert name == "blip" or len(logits) == 1
    for key, value in logits.items():
        torch.testing.assert_close(value + 0, stock_outputs[key])

    fastln.restore(model)
    assert not any(isinstance(module, LMHead) for module in model.modules())
    check(step(model, inputs)[1], want)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_smoothed_and_shifted(reduction):
    config = blip_config().text_config
    config.label_smoothing = 0.1
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    model, inputs = transformers.BlipTextLMHeadModel(config).train(), batch("")

    def losses():
        model.zero_grad()
        loss = model(**inputs, reduction=reduction).loss
        loss.pow(2).sum().backward()
        return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    want = losses()
    prepare_only(model, "late_logits")
    with Logits() as made:
        check(losses(), want)
    assert made.n_rows == 4


def test_sums_over_several_batches():
    model, inputs = make("llama"), batch("llama")
    want = step(model, inputs, num_items_in_batch=torch.tensor(37))[1]
    prepare_only(model, "late_logits")
    with Logits() as made:
        check(step(model, inputs, num_items_in_batch=torch.tensor(37))[1], want)
    assert made.n_rows == 4


def test_nothing_waits_outside_of_training():
    model, inputs = make("llama"), batch("llama")
    prepare_only(model, "late_logits")
    with torch.no_grad():
        assert type(model(**inputs).logits) is torch.Tensor
    model.eval()
    assert type(model(**inputs).logits) is torch.Tensor
    generated = model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
    assert torch.equal(model.train().generate(inputs["input_ids"], max_new_tokens=3, do_sample=False), generated)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model, inputs = make("llama"), batch("llama")
    want = step(model, inputs)[1]
    prepare_only(model, "late_logits")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    check(step(model, inputs)[1], want)


def test_copies():
    model, inputs = make("bert"), batch("bert")
    want = step(model, inputs)[1]
    prepare_only(model, "late_logits")
    twin = copy.deepcopy(model)
    check(step(twin, inputs)[1], want)
    assert isinstance(twin.get_output_embeddings(), LMHead)


def test_bfloat16_is_no_further_from_float64():
    exact = step(make("llama").double(), batch("llama"))[1]
    model, inputs = make("llama").bfloat16(), batch("llama")
    stock = step(model, inputs)[1]
    prepare_only(model, "late_logits")
    lazy = step(model, inputs)[1]

    def error(of):
        pairs = [(of[name].double(), expected) for name, expected in exact.items()]
        return sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)

    assert lazy["loss"].dtype == stock["loss"].dtype
    assert error(lazy) < 1.1 * error(stock)


def trained(model, folder, **settings):
    data = [{k: v[i] for k, v in batch("llama").items()} for i in (0, 1) * 4]
    arguments = TrainingArguments(
        folder, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], logging_steps=1,
        use_cpu=True, disable_tqdm=True, save_strategy="no", **settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2])
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log] + [trainer.evaluate()["eval_loss"]]


@pytest.mark.parametrize(
    "settings",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"label_smoothing_factor": 0.1}],
    ids=["float32", "autocast", "accumulated", "smoothed by the trainer"],
)
def test_trainer(settings, tmp_path):
    model, stock = make("llama"), make("llama")
    prepare_only(model, "late_logits")
    got, want = trained(model, tmp_path, **settings), trained(stock, tmp_path, **settings)
    torch.testing.assert_close(got, want, rtol=2e-2 if "bf16" in settings else 1e-4, atol=0)

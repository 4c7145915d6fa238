"""Prepared models under `torch.compile`: one graph, with the numbers of eager mode."""

import pytest
import torch
from family_models import batch, make
from transformers import LlamaConfig, LlamaForCausalLM

import fastln
from fastln_kernels.cpu import products


def step(model, inputs, forward):
    """Return the loss and the norms' gradients."""
    model.zero_grad()
    loss = forward(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(autouse=True)
def _compiled_anew():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


CASES = [  # without inductor, each run takes one of the last three or the test in 8 bits
    pytest.param("bert", "aot_eager"),
    *(pytest.param(name, "aot_eager", marks=pytest.mark.slow(pool="aot_eager")) for name in ("vit", "llama", "opt")),
    *(
        pytest.param(name, "inductor", marks=pytest.mark.slow(pool="inductor"))
        for name in ("bert", "vit", "llama", "opt")
    ),
]


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_a_step_is_that_of_eager_mode(name, backend):
    model, inputs = fastln.prepare(make(name)), batch(name)
    loss, gradients = step(model, inputs, model)
    compiled_loss, got = step(model, inputs, torch.compile(model, backend=backend, fullgraph=True))
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-6, atol=0)
    errors = torch.stack([(got[name] - gradient).norm() for name, gradient in gradients.items()])
    assert errors.norm() <= 1e-5 * torch.stack([gradient.norm() for gradient in gradients.values()]).norm()


@pytest.mark.slow(pool="aot_eager")
def test_a_step_in_8_bits_is_that_of_eager_mode():
    """Two terms, turned weights and biases that train, which operators take too."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, attention_bias=True))
    backend = "reference" if products.why_not("int8") else "auto"
    fastln.prepare(model, "layernorm+bias", products="int8", backend=backend, without=("late_logits", "late_rows"))
    assert sum(p.dtype == torch.int8 for p in model.parameters()) == 7
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "labels": ids}
    loss, gradients = step(model, inputs, model)
    compiled_loss, got = step(model, inputs, torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-6, atol=0)
    assert sum(name.endswith("bias") for name in gradients) == 4
    for name, gradient in gradients.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("name", ["bert", "opt"])
def test_dropout_draws_anew_at_every_call(name):
    model, inputs = make(name), batch(name)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.2
    fastln.prepare(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses = {compiled(**inputs).loss.item() for _ in range(3)}
    assert len(losses) == 3
    torch.manual_seed(0)
    first = compiled(**inputs).loss
    torch.manual_seed(0)
    assert torch.equal(compiled(**inputs).loss, first)

"""FSDP2: sharded over two processes a run has one's losses; our operations get no sharded tensor unsaid."""

import json
import re
import shutil

import pytest
import sharded_run
import torch
from launch import HERE, TWO, result, script
from safetensors import safe_open
from small_run import Sentences, llama
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh

import fastln
from fastln import ops
from fastln.adapters import CONFIG, WEIGHTS
from fastln.errors import FastLNError
from fastln.watch import PATIENCE, NormWatch, check_finite

# A bfloat16 gradient is the sum of two rounded ones, and Adam's first steps have the gradient's sign alone.
BOUNDS = {"float32": {}, "bfloat16": {"rtol": 1e-3, "atol": 1e-3}}


@pytest.mark.slow(pool="processes", take=2)
@pytest.mark.timeout(900)  # two processes import everything: minutes on a busy machine
@pytest.mark.parametrize(("dtype", "state"), [("float32", "SHARDED_STATE_DICT"), ("bfloat16", "FULL_STATE_DICT")])
def test_two_processes_that_shard_have_the_losses_of_one(dtype, state, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    sharded_run.main(one, getattr(torch, dtype), 6, state)
    script(HERE / "sharded_run.py", two, dtype, 6, state, python=TWO)
    whole = result(two)
    assert whole["sharded"]
    assert not result(one)["sharded"]
    assert whole["dtypes"] == result(one)["dtypes"] == ["torch.float32"]
    for key in ("loss", "gamma_shift"):
        torch.testing.assert_close(torch.tensor(whole[key]), torch.tensor(result(one)[key]), **BOUNDS[dtype])
    if dtype == "float32":
        for name, values in result(one)["trained"].items():
            torch.testing.assert_close(torch.tensor(whole["trained"][name]), torch.tensor(values), msg=name)
    # The adapter of the shards holds whole norms, and knows the base of one process.
    model = fastln.prepare(llama().to(getattr(torch, dtype)))
    fastln.load_adapter(model, two / "adapter")
    for name, values in whole["trained"].items():
        assert torch.equal(model.get_parameter(name), torch.tensor(values)), name
    # And it goes on from its checkpoint, bit for bit.
    (two / "result.json").unlink()
    shutil.rmtree(two / "checkpoint-6")
    script(HERE / "sharded_run.py", two, dtype, 6, state, python=TWO)
    assert result(two) == whole


BROKEN = r"model\.norm\.weight turned NaN or infinite by step"
STOPS = {
    "without a norm": [r"model\.norm\.weight \(float32\) did not move in 3 .*: the optimizer does not have them"] * 2,
    "NaN in a shard": [f"{BROKEN} 2"] * 2,
    "NaN in a shard, seen by the loss": [f"{BROKEN} 3"] * 2,
    "NaN loss": [
        "the loss is not a number at step 2 in the batch of another process",
        r"the loss is not a number at step 2 in the batch of samples s\d+, s\d+",
    ],
}


@pytest.mark.slow(pool="processes", take=2)
@pytest.mark.timeout(900)
def test_what_stops_one_process_stops_both(tmp_path):
    runs = ["accumulating", "loaded by the first", *STOPS]
    script(HERE / "watched_run.py", tmp_path, *runs, python=TWO)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for run, patterns in STOPS.items():
        for process, pattern in zip(found, patterns, strict=True):
            assert re.match(pattern, process[run]), process[run]
    # Gradients that are still to be summed are none that a norm lacks.
    shifts = found[0]["accumulating"]
    assert len(shifts) == 4
    assert shifts[0] > 0
    # γ's start is the model's, not what a process has that did not load it.
    assert found[0]["loaded by the first"] == found[1]["loaded by the first"]
    assert found[0]["loaded by the first"][0] == pytest.approx(1e-2, rel=0.1)  # Adam's first step is the rate


@pytest.fixture(scope="module")
def mesh():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


OPERATIONS = {
    "layer_norm": lambda x: ops.layer_norm(x, x[0], x[0], 1e-5),
    "rms_norm": lambda x: ops.rms_norm(x, x[0], 1e-5),
    "dropout_add_norm": lambda x: ops.dropout_add_norm(x, x, x[0], x[0], ops.NormKind(1e-5), dropout=0.5),
    "activation": lambda x: ops.activation(x, "gelu"),
    "gated_activation": lambda x: ops.gated_activation(x, x, "silu"),
    "dropout": lambda x: ops.dropout(x, 0.5),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_operation_of_ours_refuses_a_distributed_tensor(operation, requires_grad, mesh):
    x = distribute_tensor(torch.randn(3, 8), mesh, [Replicate()]).requires_grad_(requires_grad)
    with pytest.raises(NotImplementedError, match=r"fastln.* does not have a sharding strategy registered"):
        OPERATIONS[operation](x)


def test_an_adapter_of_a_sharded_model_is_that_of_the_whole_one(mesh, tmp_path):
    whole, sharded = (fastln.prepare(llama()) for _ in range(2))
    fully_shard(sharded, mesh=mesh)
    for name, model in (("whole", whole), ("sharded", sharded)):
        fastln.save_adapter(model, tmp_path / name)
    with safe_open(tmp_path / "whole" / WEIGHTS, "pt") as one, safe_open(tmp_path / "sharded" / WEIGHTS, "pt") as two:
        assert one.metadata() == two.metadata()
        assert set(one.keys()) == set(two.keys())
        assert all(torch.equal(one.get_tensor(key), two.get_tensor(key)) for key in set(one.keys()))
    assert (tmp_path / "whole" / CONFIG).read_text() == (tmp_path / "sharded" / CONFIG).read_text()
    with pytest.raises(
        FastLNError, match=r"^LlamaForCausalLM is sharded over processes, so it cannot be written whole"
    ):
        fastln.merge_adapter(sharded, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_gamma_is_watched_where_it_is_sharded(mesh):
    """The watch is set before the model is sharded, as the Trainer does it."""
    model = fastln.prepare(llama())
    watch = NormWatch(model)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in watch.parameters.values())
    assert watch.gamma_shift() == 0
    stuck = "model.layers.1.input_layernorm.weight"
    optimizer = torch.optim.SGD([p for name, p in watch.parameters.items() if name != stuck], lr=0.5)
    watch.attach(optimizer)
    for parameter in watch.parameters.values():
        parameter.grad = torch.ones_like(parameter)

    def steps():
        for _ in range(PATIENCE):
            optimizer.step()

    with pytest.raises(FastLNError, match=f"{stuck} .*did not move in {PATIENCE} optimizer steps"):
        steps()
    n_norms = len(watch.parameters)
    assert watch.gamma_shift() == pytest.approx(0.5 * PATIENCE * (n_norms - 1) / n_norms)
    check_finite(watch.parameters, 1)
    watch.parameters[stuck].detach().to_local()[0] = torch.nan
    with pytest.raises(FastLNError, match=f"{stuck} turned NaN"):
        check_finite(watch.parameters, 1)


@pytest.mark.parametrize("units", [("model.layers.1",), ("model",), ("model.norm", "lm_head"), ()])
def test_rows_do_not_wait_for_weights_that_go(units, mesh):
    """Whatever FSDP2 gathers and releases around a forward, the step is that of the whole model."""
    whole, sharded = (fastln.prepare(llama()) for _ in range(2))
    sample = Sentences()[3]
    inputs = {name: sample[name][None] for name in ("input_ids", "labels")}
    for unit in units:
        fully_shard(sharded.get_submodule(unit), mesh=mesh, reshard_after_forward=True)
    fully_shard(sharded, mesh=mesh)
    losses = [model(**inputs).loss for model in (whole, sharded)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    gradients = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    for name, parameter in sharded.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["model.norm", "model.layers.0.mlp.down_proj", "lm_head"])
def test_a_stand_in_with_a_distributed_weight_is_right_or_refuses(name, mesh):
    module = fastln.prepare(llama()).get_submodule(name)
    x = torch.randn(3, module.weight.shape[-1], requires_grad=True)
    y, weight = module(x), module.weight
    module.weight = nn.Parameter(distribute_tensor(weight.data, mesh, [Replicate()]), weight.requires_grad)
    with pytest.raises(RuntimeError, match=r"got mixed torch.Tensor and DTensor"):
        module(x)
    x = distribute_tensor(x.detach(), mesh, [Replicate()]).requires_grad_()
    if name == "model.norm":
        with pytest.raises(NotImplementedError, match="sharding strategy"):
            module(x)
    else:
        torch.testing.assert_close(module(x).to_local(), y)

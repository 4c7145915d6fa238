"""Training beside frozen weights in 8 bits: what is saved, what goes on, what is merged, and what is refused."""

import copy
import dataclasses
import json
import logging

import int8_run
import peft
import pytest
import tiny
import torch
from launch import HERE as TESTS
from launch import TWO, script
from small_run import Sentences, arguments
from transformers import LlamaConfig, LlamaForCausalLM

import fastln
from fastln import FastLNError, FastLNTrainer
from fastln.data import load_source
from fastln.engines import can_restore, put_method, to_stock
from fastln.ops import OpSettings
from fastln.ops.backends import resolve
from fastln.standins import int8
from fastln.state import prepared
from fastln.training import TrainConfig, eval_run, run
from fastln.training.features import fingerprint
from fastln.training.merge_run import merge_into_base
from fastln.training.tasks import load_values

SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
INT8 = {"products": "int8", "backend": "reference"}  # on any machine
HERE = resolve("int8_linear", torch.device("cpu"), OpSettings()).backend == "cpu"
METHODS = ["layernorm", "lora", "layernorm+lora", "bitfit"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a model whose layers are large enough for 8 bits."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64, attention_bias=True)).save_pretrained(folder)
    return folder


def load(base, dtype=torch.float32):
    return LlamaForCausalLM.from_pretrained(base, dtype=dtype)


def put(model, method, **settings):
    return put_method(model, method, "fastln", **(INT8 | settings))


def trainer(model, folder, method="layernorm", **settings):
    args = arguments(folder, max_steps=4, save_steps=2, logging_steps=4)
    return FastLNTrainer(model, args, train_dataset=Sentences(), method=method, engine="fastln", **(INT8 | settings))


def move(trained):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                start = 0 if "lora_" in name else parameter  # LoRA's are random
                parameter.copy_(start + 0.05 * torch.randn_like(parameter))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None]).logits


@pytest.mark.slow(take=2)
@pytest.mark.parametrize("method", METHODS)
def test_what_was_saved_beside_8_bits_loads_into_the_base(method, base, tmp_path, caplog):
    made = trainer(load(base), tmp_path, method)
    assert not can_restore(made.model)
    move(made.model)
    made.save_model(str(tmp_path / "saved"))
    assert caplog.text.count("gets what trained, without the base") == 1
    assert "state_dict()" not in caplog.text, "the base's weights are made again only to be dropped"
    exact = put_method(load(base), method, "fastln", backend="reference")
    move(exact)
    expected = logits(to_stock(exact))
    torch.testing.assert_close(logits(made.model), expected, rtol=0, atol=0.1 * expected.std().item())
    assert torch.equal(logits(load_values(load(base), tmp_path / "saved")), expected)
    if method == "layernorm":
        again = put(load(base), method)
        fastln.load_adapter(again, tmp_path / "saved")
        assert torch.equal(logits(again), logits(made.model))
    merge_into_base(str(base), tmp_path / "saved", tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), expected)


@pytest.mark.slow(take=2)
@pytest.mark.parametrize("method", METHODS)
def test_without_its_weights_a_model_is_left_as_it_is(method, base):
    trained = put(load(base), method)
    before = logits(trained)
    with pytest.raises(FastLNError, match=r"8-bit weights replaced.*keep_weights=True"):
        to_stock(trained)
    if method in ("layernorm", "bitfit"):
        with pytest.raises(FastLNError, match=r"did not keep them.*keep_weights=True"):
            fastln.merge_adapter(trained, "nowhere")
    assert torch.equal(logits(trained), before)


@pytest.mark.slow(take=2)
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_were_kept_take_what_trained(method, base, tmp_path):
    exact = put_method(load(base), method, "fastln", backend="reference")
    made = trainer(load(base), tmp_path, method, keep_weights=True)
    for trained in (exact, made.model):
        move(trained)
    assert {name for name, p in made.model.named_parameters() if p.dtype == torch.int8}
    saved = None
    if method in ("layernorm", "bitfit"):
        made.save_model(str(tmp_path / "saved"))
        saved = load(tmp_path / "saved").state_dict()
    stock, expected = to_stock(made.model), to_stock(exact)
    assert {p.dtype for p in stock.parameters()} == {torch.float32}
    for state in (stock.state_dict(), saved or stock.state_dict()):
        assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
    assert prepared(stock) is None


def test_a_run_resumes_to_the_same_bits_and_the_model_goes_on(base, tmp_path, caplog):
    own = {"backend": int8_run.BACKEND}  # this machine's kernels, where it has them
    whole = trainer(load(base), tmp_path / "a", **own)
    whole.train()
    resumed = trainer(load(base), tmp_path / "a", **own)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    values = {name: p.clone() for name, p in whole.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(p, values[name]) for name, p in resumed.model.named_parameters() if p.requires_grad)
    assert "was trained with products" not in caplog.text
    with caplog.at_level(logging.INFO, "fastln"):
        again = trainer(resumed.model, tmp_path / "b", **own)
    assert "the model has method layernorm already, and goes on from its tuned values" in caplog.text
    assert again.model is resumed.model
    for other in ({"products": "exact"}, {"method": "bitfit"}, {"keep_weights": True}, {"without": "dropout"}):
        with pytest.raises(FastLNError, match=r"had method layernorm, whose 8-bit weights replaced its own, so it can"):
            trainer(resumed.model, tmp_path / "b", **(own | other))


@pytest.mark.parametrize(("before", "now"), [("int8", "exact"), ("exact", "int8")])
def test_a_run_that_resumes_with_other_products_says_so(before, now, base, tmp_path, caplog):
    trainer(load(base), tmp_path, products=before).train()
    trainer(load(base), tmp_path, products=now).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    told = [message for message in caplog.messages if "was trained with products" in message]
    assert told == [
        f"{tmp_path / 'checkpoint-2'} was trained with products '{before}', and this training goes on with products "
        f"'{now}': its losses and gradients are those of other arithmetic"
    ]


def test_layers_of_peft_have_the_dtype_of_the_model(base):
    trained = put(load(base, torch.bfloat16), "lora")
    assert {p.dtype for p in trained.parameters() if p.requires_grad} == {torch.bfloat16}
    assert logits(trained).dtype == torch.bfloat16


@pytest.mark.parametrize("keep_weights", [False, True])
def test_lora_is_not_merged_into_8_bits(keep_weights, base):
    trained = put(load(base), "lora", keep_weights=keep_weights)
    before = logits(trained)
    for merge in (trained.merge_and_unload, trained.merge_adapter, lambda: trained.merge_and_unload(safe_merge=True)):
        with pytest.raises(FastLNError, match="LoRA cannot be merged into weights in 8 bits: save the adapter or"):
            merge()
    assert torch.equal(logits(copy.deepcopy(trained)), before)


def test_peft_s_own_layers_on_8_bits_are_told_not_to_be_merged(base, monkeypatch, caplog):
    monkeypatch.setattr(int8, "_told", set())
    put(load(base), "lora")  # which refuses by itself
    assert "peft" not in caplog.text
    for _ in range(2):
        prepared_one = fastln.prepare(load(base), **INT8)
        peft.get_peft_model(prepared_one, peft.LoraConfig(target_modules=["q_proj"]))
    assert caplog.text.count("merge_and_unload() and merge_adapter() of peft fail, or round away what was learned") == 1


def test_cached_features_are_those_of_one_scale(base):
    found = set()
    for factor in (1, 2):
        model = load(base).model
        with torch.no_grad():
            model.layers[0].mlp.down_proj.weight.mul_(factor)  # the same whole numbers, with another scale
        found.add(fingerprint(put(model, "layernorm")))
    assert len(found) == 2


@pytest.mark.slow(pool="processes", take=2)
@pytest.mark.timeout(900)
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """Rows are rounded one by one, so it does not matter which process has which."""
    script(TESTS / "int8_run.py", tmp_path, *int8_run.CASES, python=TWO)
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for case in int8_run.CASES:
        first, second = (found[case] for found in both)
        assert (first["loss"] + second["loss"]) / 2 == pytest.approx(first["whole loss"], rel=1e-5), case
        assert max(first["apart"], second["apart"]) < 1e-5, case


@pytest.mark.skipif(not HERE, reason="frozen layers stay exact here")
def test_a_run_scores_and_saves_the_base_that_it_loads_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "SIZES", SIZES)
    tiny.towers(tmp_path, tiny.phantom(24).samples)

    def few(*args):
        source = load_source(*args)
        return dataclasses.replace(source, splits={name: rows[:24] for name, rows in source.splits.items()})

    for module in (run, eval_run):
        monkeypatch.setattr(module, "load_source", few)
    source, out = f"dual:{tmp_path / 'vision'},{tmp_path / 'text'}", tmp_path / "out"
    config = TrainConfig(epochs=1, head_epochs=1, batch_size=8, products="int8")
    outcome = run.run_training(run.TrainRun("phantom", source, None, config, dtype="float32"), out)
    assert json.loads((out / "run.json").read_text())["run"]["config"]["products"] == "int8"
    assert eval_run.run_evaluation(eval_run.EvalRun(str(out), "phantom", batch_size=8)) == outcome.test
    adapted = eval_run.EvalRun(source, "phantom", adapter=out / "adapter", batch_size=8)
    assert eval_run.run_evaluation(adapted) == outcome.test
    with pytest.raises(FastLNError, match=r"would overwrite its own base .*products 'int8' loads again"):
        run.run_training(run.TrainRun("phantom", str(out), None, config, dtype="float32"), out, overwrite=True)

"""What loads a checkpoint, or a saved model, beside the run that goes on from it; and what says that it cannot."""

import json
import re

import peft
import pytest
import torch
from resuming import Stop, same, state
from safetensors.torch import load_file, save_file
from small_run import Sentences, arguments, llama
from transformers import AutoModelForCausalLM, Trainer

import fastln
from fastln import FastLNError, FastLNTrainer
from fastln.adapters import TRAINED, WHOLE
from fastln.fingerprint import FINGERPRINT, fingerprint
from fastln.models.tokens import word_tokenizer
from fastln.training.tasks import load_values
from fastln.training.trained import load_trained, trained_parameters


def test_a_checkpoint_says_its_base_and_transformers_and_peft_load_it(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("base")
    words = word_tokenizer(["one two"], 60)
    trainer = FastLNTrainer(model, arguments("out", max_steps=2), train_dataset=Sentences(), processing_class=words)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    assert {path.name for path in checkpoint.iterdir()} >= {"tokenizer.json", "training_args.bin"}
    batch = {name: tensor[None] for name, tensor in Sentences()[1].items() if name != "id"}
    expected = fastln.restore(trainer.model).eval()(**batch).loss
    monkeypatch.chdir("/")
    for loaded in (
        AutoModelForCausalLM.from_pretrained(checkpoint),
        peft.AutoPeftModelForCausalLM.from_pretrained(checkpoint),
    ):
        assert torch.equal(loaded.eval()(**batch).loss, expected)


def test_if_everything_trains_a_checkpoint_is_what_stock_writes(tmp_path):
    for cls, extra in ((FastLNTrainer, {"method": "full"}), (Trainer, {})):
        trainer = cls(llama(), arguments(tmp_path / cls.__name__, max_steps=2), train_dataset=Sentences(), **extra)
        trainer.train()
    ours, stock = (
        {p.name for p in (tmp_path / name / "checkpoint-2").iterdir()} for name in ("FastLNTrainer", "Trainer")
    )
    assert ours - stock == {"files.json", "fastln.json"}
    assert stock <= ours
    loaded, by_stock = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "checkpoint-2") for name in ("FastLNTrainer", "Trainer")
    )
    for name, tensor in by_stock.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    again = FastLNTrainer(llama(), arguments(tmp_path / "FastLNTrainer"), train_dataset=Sentences(), method="full")
    load_trained(again.model, tmp_path / "FastLNTrainer" / "checkpoint-2")
    assert same(again.model, state(loaded))
    onto = llama()
    fastln.load_adapter(onto, tmp_path / "FastLNTrainer" / "checkpoint-2")
    assert same(onto, state(loaded))


@pytest.mark.parametrize("method", ["bitfit", "attention"])
def test_what_no_adapter_holds_loads_by_its_plain_names_and_other_loaders_say_so(method, tmp_path):
    def base():
        return llama(attention_bias=True)

    base().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = FastLNTrainer(model, arguments(tmp_path / "out", max_steps=2), train_dataset=Sentences(), method=method)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert set(load_file(checkpoint / TRAINED)) == set(trained_parameters(trainer.model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fastln.load_adapter(loaded, checkpoint)
    assert same(loaded, state(trainer.model))
    for load in (
        AutoModelForCausalLM.from_pretrained,
        lambda folder: peft.PeftModel.from_pretrained(base(), folder),
    ):
        with pytest.raises(Exception, match=re.escape("call fastln.load_adapter(base, folder)")):
            load(checkpoint)


@pytest.mark.parametrize("method", ["lora/peft", "lora/fastln", "layernorm+lora/fastln"])
def test_a_new_head_beside_lora_resumes_on_a_base_with_other_random_values(method, tmp_path, caplog):
    llama().model.save_pretrained(tmp_path / "base")
    method, engine = method.split("/")
    settings = {"method": method, "engine": engine, "train_dataset": Sentences()}

    def run():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        return FastLNTrainer(model, arguments(tmp_path, max_steps=4), **settings)

    stopped = run()
    stopped.add_callback(Stop(2))
    stopped.train()
    trained = state(stopped.model)
    torch.manual_seed(5)
    resumed = run()
    load_trained(resumed.model, tmp_path / "checkpoint-2")
    names = trained_parameters(resumed.model)
    assert any("lm_head" in name for name in names)
    assert all(torch.equal(parameter, trained[name]) for name, parameter in names.items())
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        want = resumed.model.eval()(input_ids=ids).logits
        caplog.clear()
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        got = load_values(base, tmp_path / "checkpoint-2").eval()(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert "has no effect" not in caplog.text


def test_save_model_leaves_no_norm_out_beside_lora(tmp_path):
    trainer = FastLNTrainer(llama(), arguments(tmp_path), train_dataset=Sentences(), method="layernorm+lora")
    with torch.no_grad():
        for parameter in trained_parameters(trainer.model).values():
            parameter.add_(0.1)
    trainer.save_model(str(tmp_path / "model"))
    again = FastLNTrainer(llama(), arguments(tmp_path), train_dataset=Sentences(), method="layernorm+lora")
    load_trained(again.model, tmp_path / "model")
    assert same(again.model, state(trainer.model))


@pytest.mark.parametrize("also", [(), ("model.embed_tokens", "lm_head")])
def test_a_resized_vocabulary_is_told_with_what_to_do(also, tmp_path):
    def run(n_tokens=None):
        model = llama()
        if n_tokens is not None:
            model.resize_token_embeddings(n_tokens)
        return FastLNTrainer(model, arguments(tmp_path / "out", max_steps=2), train_dataset=Sentences(), also=also)

    run(72).train()
    advice = r"its vocabulary has 72 tokens there and 64 here; call model\.resize_token_embeddings\(72\) first"
    with pytest.raises(FastLNError, match=advice):
        run().train(resume_from_checkpoint=True)
    with pytest.raises(FastLNError, match=advice):
        fastln.load_adapter(llama(), tmp_path / "out" / "checkpoint-2")


def test_a_checkpoint_of_an_earlier_version_loads_and_refuses_another_base(tmp_path):
    model = fastln.prepare(llama(), backend="reference")
    norms = {name: p.detach() + 1 for name, p in trained_parameters(model).items()}
    save_file(norms, tmp_path / TRAINED, {FINGERPRINT: fingerprint(model, norms)})
    load_trained(model, tmp_path)
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in norms.items())
    with torch.no_grad():
        model.lm_head.weight += 1
    with pytest.raises(FastLNError, match="it is from another base model: 1 of"):
        load_trained(model, tmp_path)


def test_norms_beside_lora_are_no_adapter_of_a_stock_model(tmp_path):
    args = arguments(tmp_path, max_steps=2)
    FastLNTrainer(llama(), args, train_dataset=Sentences(), method="layernorm+lora").train()
    with pytest.raises(FastLNError, match=r"holds LoRA layers beside norms.*fastln eval and fastln merge read it"):
        fastln.load_adapter(llama(), tmp_path / "checkpoint-2")


def test_save_model_writes_what_stock_writes_also_for_the_hub(tmp_path):
    def files(cls, **settings):
        trainer = cls(llama().bfloat16(), arguments(tmp_path / "out"), train_dataset=Sentences(), **settings)
        for name in ("model", "hub"):
            trainer.save_model(str(tmp_path / cls.__name__ / name), _internal_call=name == "hub")
        trainer.save_state()
        return [{p.name for p in (tmp_path / cls.__name__ / name).iterdir()} for name in ("model", "hub")]

    ours = files(FastLNTrainer)
    assert ours == files(Trainer)
    stored = load_file(tmp_path / "FastLNTrainer" / "hub" / WHOLE)
    assert stored["model.norm.weight"].dtype == torch.float32, "every digit of the norms"
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "FastLNTrainer" / "hub")
    assert again.dtype == torch.bfloat16
    assert (tmp_path / "out" / "trainer_state.json").is_file()

"""Merging: the whole model, stock, with the tuned values; from a model or by folders, fastln's adapters and peft's."""

import errno
import os
import signal

import family_models
import pytest
import tiny
import torch
from small_run import arguments
from transformers import AutoTokenizer, BertForSequenceClassification, ViTImageProcessorPil
from tuned import loss, move, tuned

import fastln
from fastln import FastLNTrainer
from fastln.engines import put_method, save_trained_adapter
from fastln.errors import FastLNError
from fastln.models.tokens import word_tokenizer
from fastln.training import evaluate
from fastln.training.merge_run import merge_into_base


@pytest.mark.parametrize("name", ["bert", "llama", "blip"])
def test_a_merged_model_is_stock_in_the_bases_dtype(name, tmp_path):
    model = tuned(name, dtype=torch.bfloat16)
    exact = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match=r"bfloat16 rounds [\d,]+ of [\d,]+ tuned values, by up to .*keep the adapter"):
        fastln.merge_adapter(model, tmp_path)
    assert all(torch.equal(tensor, exact[key]) for key, tensor in model.state_dict().items())
    again = type(model).from_pretrained(tmp_path, dtype="auto")
    assert all(parameter.dtype == torch.bfloat16 for parameter in again.parameters())
    fastln.restore(model)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("is_there", [False, True])
def test_a_merge_killed_or_without_space_leaves_the_target_as_it_was(is_there, tmp_path, monkeypatch):
    model, target = tuned("llama"), tmp_path / "merged"
    if is_there:
        fastln.merge_adapter(model, target)
        (target / "model-00001-of-00002.safetensors").touch()  # of a model in two files
        (target / "tokenizer.json").write_text("{}")
        move(model)

    def files():
        return {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()} if target.exists() else {}

    before = files()
    for name in ("fsync", "rename"):
        pid = os.fork()
        if pid == 0:
            monkeypatch.setattr(os, name, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
            fastln.merge_adapter(model, target)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        assert files() == before

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FastLNError, match=r"cannot be written: .*No space left"):
            fastln.merge_adapter(model, target)
    assert files() == before
    assert {path.name for path in tmp_path.iterdir()} == ({"merged"} if is_there else set())
    fastln.merge_adapter(model, target)
    again = type(model).from_pretrained(target)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    kept = {"tokenizer.json"} if is_there else set()
    assert {path.name for path in target.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    } | kept


def test_a_folder_with_another_model_or_an_adapter_is_refused(tmp_path):
    model = tuned("llama")
    family_models.make("mistral").save_pretrained(tmp_path / "other kind")
    wide = family_models.of("LlamaForCausalLM", "LlamaConfig", **{**family_models.LLAMA, "intermediate_size": 96})()
    wide.save_pretrained(tmp_path / "other sizes")
    fastln.save_adapter(model, tmp_path / "adapter")
    for name, why in (("other kind", "another model"), ("other sizes", "another model"), ("adapter", "an adapter")):
        before = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        with pytest.raises(FastLNError, match=f"{name}: it holds {why}.*give another folder"):
            fastln.merge_adapter(model, tmp_path / name)
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == before


@pytest.mark.parametrize("kind", ["vit", "dual"])
def test_merging_by_folders(kind, tmp_path):
    data = tiny.phantom(12)
    if kind == "dual":
        task = tiny.dual(tmp_path, data)
        task.save(tmp_path / "base")
        model = fastln.prepare(task.model, also=task.head, backend="reference")
    else:
        base = family_models.make("vit")
        base.save_pretrained(tmp_path / "base")
        model = fastln.prepare(base, also=["classifier"], backend="reference")
    move(model)
    fastln.save_adapter(model, tmp_path / "adapter")
    merge_into_base(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    if kind == "dual":
        fastln.restore(model)
        assert evaluate(tiny.load_task(str(tmp_path / "merged"), data), data) == evaluate(task, data)
    with pytest.raises(FastLNError, match="merged: is there already"):
        merge_into_base(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_an_adapter_of_pefts_is_merged_by_folders(method, tmp_path):
    family_models.make("llama").save_pretrained(tmp_path / "base")
    wrapped = put_method(family_models.make("llama"), method)
    move(wrapped)
    save_trained_adapter(wrapped, tmp_path / "adapter")
    merge_into_base(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    again = type(family_models.make("llama")).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loss(again, "llama"), loss(wrapped, "llama"))
    assert (loss(again, "llama") - loss(family_models.make("llama"), "llama")).abs() > 1e-3


@pytest.mark.parametrize("method", ["layernorm", "lora", "layernorm+bias", "full"])
def test_a_head_that_the_base_lacks_is_merged_too(method, tmp_path):
    family_models.make("bert").save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    args = arguments(tmp_path / "out", max_steps=1, save_steps=1)
    ids = torch.arange(12).view(2, 6) + 3
    trainer = FastLNTrainer(model, args, train_dataset=[{"input_ids": row, "labels": 1} for row in ids], method=method)
    trainer.train()
    merge_into_base(None, tmp_path / "out" / "checkpoint-1", tmp_path / "merged")
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        got, want = (m(input_ids=ids).logits for m in (merged, trainer.model.eval()))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_virtual_tokens_is_refused(tmp_path):
    family_models.make("llama").save_pretrained(tmp_path / "base")
    save_trained_adapter(put_method(family_models.make("llama"), "prompt"), tmp_path / "adapter")
    with pytest.raises(FastLNError, match="this is a PROMPT_TUNING adapter; its virtual tokens cannot"):
        merge_into_base(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def base_and_adapter(folder, tokenizer):
    """Write a tiny Llama to `folder`/base, with a tokenizer and without, and an adapter of it to `folder`/adapter."""
    family_models.make("llama").save_pretrained(folder / "base")
    if tokenizer:
        word_tokenizer(["what organ is this"], 128).save_pretrained(folder / "base")
    fastln.save_adapter(tuned("llama"), folder / "adapter")
    return str(folder / "base"), folder / "adapter", folder / "merged"


def test_a_base_without_a_tokenizer_merges_without_a_word_of_warning(tmp_path, caplog):
    arguments = base_and_adapter(tmp_path, tokenizer=False)
    caplog.set_level("INFO", "fastln")
    merge_into_base(*arguments)
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / 'merged'}: wrote the model"]
    assert not (tmp_path / "merged" / "tokenizer.json").exists()


def test_the_tokenizer_comes_with_the_merged_model(tmp_path, caplog):
    arguments = base_and_adapter(tmp_path, tokenizer=True)
    caplog.set_level("INFO", "fastln")
    merge_into_base(*arguments)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'merged'}: wrote the model, its tokenizer"
    ]
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again("what organ").input_ids == AutoTokenizer.from_pretrained(tmp_path / "base")("what organ").input_ids


@pytest.mark.parametrize("broken", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_what_is_broken_beside_the_base_is_named_with_the_reason(broken, tmp_path, caplog):
    base, adapter, merged = base_and_adapter(tmp_path, tokenizer=True)
    ViTImageProcessorPil().save_pretrained(base)
    (tmp_path / "base" / broken).write_text("{")
    merge_into_base(base, adapter, merged)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    tool = "preprocessor" if broken.startswith("pre") else "tokenizer"
    reason = f"the merged model gets no {tool}: that of {base}: cannot be loaded: "
    assert any(line.startswith(reason) for line in warned)
    assert (merged / "tokenizer.json").exists() == (tool != "tokenizer")
    assert (merged / "preprocessor_config.json").exists() == (tool != "preprocessor")
    assert (merged / "model.safetensors").exists()

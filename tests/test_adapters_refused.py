"""Adapters that do not fit, are damaged, or cannot be written; and several processes that write one."""

import errno
import os

import family_models
import pytest
import torch
from launch import HERE, TWO, script
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import distributed
from tuned import move, tuned

import fastln
from fastln import adapters
from fastln import fingerprint as fingerprints
from fastln.adapters import CONFIG, WEIGHTS
from fastln.errors import FastLNError
from fastln.fingerprint import FINGERPRINT
from fastln.methods import norm_parameters


def test_another_base_is_refused_and_can_be_insisted_on(tmp_path):
    model = tuned("bert")
    fastln.save_adapter(model, tmp_path)
    other = family_models.make("bert", seed=1)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(FastLNError, match=r"trained on another base.*check_base=False"):
        fastln.load_adapter(other, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    fastln.load_adapter(other, tmp_path, check_base=False)
    name = norm_parameters(other)[0]
    assert torch.equal(other.get_parameter(name), model.get_parameter(name))


def test_an_adapter_for_another_model_is_named(tmp_path):
    fastln.save_adapter(tuned("bert"), tmp_path)
    with pytest.raises(FastLNError, match=r"for another model: LlamaForCausalLM has no bert\.embeddings"):
        fastln.load_adapter(family_models.make("llama"), tmp_path)
    wide = family_models.of("BertForMaskedLM", "BertConfig", **{**family_models.BERT, "hidden_size": 64})()
    with pytest.raises(FastLNError, match=r"is \(32,\) in it, and \(64,\) in this BertForMaskedLM"):
        fastln.load_adapter(wide, tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "adapter_model.safetensors: cannot be read, it is damaged or cut short"),
        ("emptied", "adapter_model.safetensors: cannot be read"),
        ("no weights", "there is no adapter_model.safetensors in this folder"),
        ("pickle", "adapter_model.bin, a pickle, which fastln never reads"),
        ("no config", "there is no adapter_config.json in this folder"),
        ("config cut", "adapter_config.json: cannot be read"),
        ("config a list", "adapter_config.json: must be a mapping, not list"),
        ("lora", "this is a LORA adapter; load_adapter reads LN_TUNING adapters"),
    ],
)
def test_a_damaged_adapter_is_named_and_the_model_stays(damage, message, tmp_path):
    fastln.save_adapter(tuned("bert"), tmp_path)
    weights, config = tmp_path / WEIGHTS, tmp_path / CONFIG
    data = weights.read_bytes()
    if damage in ("cut", "emptied"):
        weights.write_bytes(data[:-9] if damage == "cut" else b"")
    if damage in ("no weights", "pickle"):
        weights.unlink()
    if damage == "pickle":
        (tmp_path / "adapter_model.bin").write_bytes(b"")
    if damage == "no config":
        config.unlink()
    if damage in ("config cut", "config a list", "lora"):
        config.write_text({"config cut": "{", "config a list": "[]", "lora": '{"peft_type": "LORA"}'}[damage])
    model = family_models.make("bert")
    with pytest.raises(FastLNError) as caught:
        fastln.load_adapter(model, tmp_path)
    assert message in str(caught.value)
    stock = family_models.make("bert").state_dict()
    assert all(torch.equal(tensor, stock[name]) for name, tensor in model.state_dict().items())


def test_a_run_given_as_an_adapter_is_told_where_its_adapter_is(tmp_path):
    fastln.save_adapter(tuned("bert"), tmp_path / "adapter")
    with pytest.raises(FastLNError, match=rf"in this folder; {tmp_path / 'adapter'} is an adapter"):
        fastln.load_adapter(family_models.make("bert"), tmp_path)


def test_a_folder_that_is_not_there_is_no_adapter(tmp_path):
    with pytest.raises(FastLNError, match="nowhere: is no folder"):
        fastln.load_adapter(family_models.make("bert"), tmp_path / "nowhere")


def test_a_full_disk_leaves_the_old_adapter_whole(tmp_path, monkeypatch):
    model = tuned("bert")
    fastln.save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    move(model)
    fsync = os.fsync
    for n_whole in (0, 1):
        calls = []

        def full(handle, n_whole=n_whole, calls=calls):
            calls.append(handle)
            if len(calls) > n_whole:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(handle)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(FastLNError, match=r"cannot be written, and nothing there changed: .*No space left"):
            fastln.save_adapter(model, tmp_path)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.setattr(os, "fsync", fsync)
    fastln.save_adapter(model, tmp_path)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    assert after[WEIGHTS] != before[WEIGHTS]
    with pytest.raises(FastLNError, match=r"config\.json/x: the adapter cannot be written"):
        fastln.save_adapter(model, tmp_path / CONFIG / "x")


@pytest.mark.parametrize(
    ("method", "also", "message"),
    [
        ("bitfit", (), r"holds norms and the modules named in `also`, but \d+ other parameters train too"),
        ("full", (), r"holds norms and the modules named in `also`, but \d+ other parameters train too"),
        ("head", ("cls",), "no norm of this model trains"),
    ],
)
def test_what_is_no_adapter_says_so(method, also, message, tmp_path):
    model = fastln.prepare(family_models.make("bert"), method, also=also)
    with pytest.raises(FastLNError, match=f"{message}.*fastln.merge_adapter"):
        fastln.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(FastLNError, match="save the adapter between"):
        fastln.save_adapter(fastln.restore(model), tmp_path / "adapter")


def test_an_adapter_with_the_fingerprint_of_before_still_loads(tmp_path):
    model = tuned("bert")
    fastln.save_adapter(model, tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        digest = file.metadata()[FINGERPRINT].split()[1].removeprefix("bfloat16=")
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, {FINGERPRINT: digest})
    again = family_models.make("bert")
    fastln.load_adapter(again, tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(FastLNError, match="trained on another base"):
        fastln.load_adapter(family_models.make("bert", seed=1), tmp_path)


def test_all_processes_gather_alike(tmp_path, monkeypatch):
    """One that gathered alone would wait for the others for ever."""
    model, counts = tuned("llama"), []
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    for rank in (0, 1):
        gathered = []
        monkeypatch.setattr(distributed, "get_rank", lambda *group, rank=rank: rank)
        for module in (adapters, fingerprints):
            monkeypatch.setattr(
                module, "gathered", lambda tensor, own=gathered: own.append(tensor.shape) or tensor.detach()
            )
        fastln.save_adapter(model, tmp_path / "adapter", dtype=torch.float16)
        counts.append(gathered)
    assert counts[0] == counts[1]


def test_of_several_processes_the_first_alone_writes(tmp_path, monkeypatch):
    model = tuned("llama")
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "get_rank", lambda *group, rank=rank: rank)
        fastln.save_adapter(model, tmp_path / "adapter")
        fastln.merge_adapter(model, tmp_path / "merged")
        assert (tmp_path / "adapter" / WEIGHTS).exists() == (tmp_path / "merged" / "config.json").exists() == (not rank)
    monkeypatch.setattr(distributed, "get_rank", lambda *group: 1)
    fastln.merge_adapter(model, tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.slow(pool="processes", take=2)
@pytest.mark.timeout(900)
def test_two_processes_save_into_one_folder(tmp_path):
    script(HERE / "saving_run.py", tmp_path, python=TWO)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged"}
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {WEIGHTS, CONFIG}

"""Models from every kind of source, what they make of samples, and what bad sources get."""

import json
from dataclasses import replace

import pytest
import tiny
import tiny_chat
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from fastln.data import Sample
from fastln.errors import FastLNError
from fastln.methods import count_parameters, learning_rates
from fastln.models import load_task
from fastln.models.tokens import word_tokenizer
from fastln.training import parameter_groups
from fastln.training.tasks import apply_method


@pytest.mark.parametrize("kind", tiny.TASKS)
def test_a_saved_task_comes_back_and_answers_the_same(kind, tmp_path):
    data = tiny.phantom()
    task = tiny.TASKS[kind](tmp_path / "source", data) if kind == "blip" else tiny.dual(tmp_path, data)
    task.model.eval()
    task.save(tmp_path / "saved")
    again = load_task(str(tmp_path / "saved"), data)
    again.model.eval()
    batch = task.collate(data.samples[:6], data)
    assert again.answers(again.collate(data.samples[:6], data)) == task.answers(batch)
    torch.testing.assert_close(again.model(**batch).loss, task.model(**batch).loss)
    assert again.random_head == ()
    assert again.random_weights == (kind == "blip")


def test_questions_on_one_image_share_its_vision_pass_exactly(tmp_path):
    data = tiny.phantom()
    task = tiny.dual(tmp_path, data)
    task.model.eval()
    batch = task.collate(data.samples[:8], data)
    n_images = len({sample.image for sample in data.samples[:8]})
    assert len(batch["pixel_values"]) == n_images < 8
    apart = {**batch, "pixel_values": batch["pixel_values"][batch["image_index"]], "image_index": None}
    torch.testing.assert_close(task.model(**batch).logits, task.model(**apart).logits)


def test_padding_changes_no_answer(tmp_path):
    data = tiny.phantom()
    task = tiny.dual(tmp_path, data)
    task.model.eval()
    by_length = sorted(data.samples, key=lambda sample: len(sample.question.split()))
    short, long = by_length[0], by_length[-1]
    alone = task.model(**task.collate([short], data)).logits
    padded = task.model(**task.collate([short, long], data)).logits[:1]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def test_a_tower_can_be_the_half_of_a_larger_model(tmp_path):
    data = tiny.phantom()
    tiny.towers(tmp_path, data.samples)
    sizes = {**tiny.SIZES, "projection_dim": 16}
    clip = CLIPModel(
        CLIPConfig(vision_config={**sizes, "image_size": 32, "patch_size": 8}, text_config={**sizes, "vocab_size": 64})
    )
    clip.save_pretrained(tmp_path / "clip")
    task = load_task(f"dual:{tmp_path / 'clip'},{tmp_path / 'text'}", data)
    weight = "encoder.layers.1.mlp.fc1.weight"
    names = [name for name in task.model.vision.state_dict() if name.endswith(weight)]
    stock = {name.removeprefix("vision_model."): value for name, value in clip.state_dict().items()}
    assert len(names) == 1
    torch.testing.assert_close(task.model.vision.state_dict()[names[0]], stock[weight])
    assert task.model(**task.collate(data.samples[:3], data)).loss.isfinite()


def test_the_head_is_seeded_and_the_towers_are_the_checkpoints(tmp_path):
    data = tiny.phantom()
    one, same, other = (tiny.dual(tmp_path, data, seed=seed).model for seed in (0, 0, 1))
    assert torch.equal(one.fusion_head.hidden.weight, same.fusion_head.hidden.weight)
    assert not torch.equal(one.fusion_head.hidden.weight, other.fusion_head.hidden.weight)
    stock = AutoModel.from_pretrained(tmp_path / "vision").state_dict()
    assert all(torch.equal(tensor, stock[name]) for name, tensor in one.vision.state_dict().items())


def test_blip_learns_to_say_the_answer_and_to_stop(tmp_path):
    data = tiny.phantom()
    task = tiny.blip(tmp_path, data)
    config = task.model.config.text_config
    batch = task.collate(data.samples[:3], data)
    for row, sample in enumerate(data.samples[:3]):
        labels = batch["labels"][row][batch["labels"][row] != -100].tolist()
        assert labels[0] == config.bos_token_id
        assert labels[-1] == config.sep_token_id
        assert task.tokenizer.decode(labels[1:-1]) == sample.answer.lower()
    task.model.eval()
    assert len(task.answers(batch)) == 3


def test_an_unseen_answer_is_no_label(tmp_path):
    data = tiny.phantom()
    task = tiny.dual(tmp_path, data)
    image = data.samples[0].image
    samples = [Sample("x", image, "what?", "never heard of", closed=False), data.samples[0]]
    labels = task.collate(samples, data)["labels"].tolist()
    assert labels[0] == -100
    assert task.vocabulary[labels[1]] == data.samples[0].answer.lower()


def test_word_tokenizer_keeps_the_ids_that_a_configuration_gives():
    tokenizer = word_tokenizer(["a b b c", "C?"], 9, pad_id=3, sep_id=1, taken=(0,))
    assert tokenizer.pad_token_id == 3
    assert tokenizer.sep_token_id == 1
    ids = tokenizer("b c unknown")["input_ids"]
    assert ids[2:] == [tokenizer.unk_token_id, 1], "a text ends with [SEP]"
    assert 0 not in tokenizer.get_vocab().values()
    assert max(tokenizer.get_vocab().values()) < 9
    with pytest.raises(FastLNError, match="no room for the special tokens"):
        word_tokenizer(["a"], 3)


def test_a_pooler_that_the_checkpoint_lacks_is_left_out(tmp_path):
    data = tiny.phantom()
    tiny.towers(tmp_path, data.samples)
    model = AutoModel.from_pretrained(tmp_path / "vision")
    assert model.pooler is not None
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("pooler.")}
    model.save_pretrained(tmp_path / "vision", state_dict=state)
    one, same = (tiny.dual(tmp_path, data) for _ in range(2))
    assert one.model.vision.pooler is None
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), same.model.parameters(), strict=True))
    one.save(tmp_path / "saved")
    again = load_task(str(tmp_path / "saved"), data)
    assert set(again.model.state_dict()) == set(one.model.state_dict())


def test_a_tower_that_has_a_head_of_its_own(tmp_path):
    """SigLIP's vision encoder pools through a module called `head`, which must not pass for the task's."""
    data = tiny.phantom()
    tiny.towers(tmp_path, data.samples)
    siglip = SiglipVisionModel(SiglipVisionConfig(**tiny.SIZES, image_size=32, patch_size=8))
    siglip.save_pretrained(tmp_path / "siglip")
    counts = set()
    for engine in ("fastln", "torch", "peft"):
        task = load_task(f"dual:{tmp_path / 'siglip'},{tmp_path / 'text'}", data)
        model = apply_method(task, "layernorm", engine)
        counts.add(count_parameters(model)[0])
        head = parameter_groups(model, task.head, learning_rates("layernorm", head=7.0))
        n_head = sum(p.numel() for group in head if group["lr"] == 7.0 for p in group["params"])
        assert n_head == count_parameters(task.model.fusion_head)[0]
    assert len(counts) == 1


def test_broken_models_are_named(tmp_path):
    data = tiny.phantom()
    saved = tmp_path / "saved"
    task = tiny.dual(tmp_path, data)
    task.save(saved)
    config = json.loads((saved / "config.json").read_text())

    def refused(spec, message):
        with pytest.raises(FastLNError) as caught:
            load_task(spec, data)
        assert message in str(caught.value)

    write_json(saved / "config.json", {**config, "answers": []})
    refused(str(saved), "vocabulary is empty")
    write_json(saved / "config.json", {**config, "answers": [f"no answer {i}" for i in range(len(config["answers"]))]})
    refused(str(saved), f"not one answer of {data.name} is among")
    write_json(saved / "config.json", config)
    state = {name: tensor for name, tensor in task.model.state_dict().items() if not name.startswith("fusion_head.")}
    save_file(state, saved / "model.safetensors", metadata={"format": "pt"})
    refused(str(saved), "lacks 4 tensors of its dual encoder, for example fusion_head.classifier.bias")
    weights = tmp_path / "vision" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(f"dual:{tmp_path / 'vision'},{tmp_path / 'text'}", f"{tmp_path / 'vision'}: cannot be loaded")
    refused(f"blip:{write_json(tmp_path / 'list.json', [1])}", "list.json: cannot be loaded")
    typed = tiny.blip_config().to_dict()
    typed["vision_config"]["num_attention_heads"] = 5
    refused(f"blip:{write_json(tmp_path / 'odd.json', typed)}", "odd.json: cannot be loaded")
    ConvNextModel(ConvNextConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8])).save_pretrained(tmp_path / "convnext")
    refused(f"dual:{tmp_path / 'convnext'},{tmp_path / 'text'}", "an encoder of type 'convnext' has no hidden_size")


def write_json(path, value):
    path.write_text(json.dumps(value))
    return path


def test_bad_sources_are_named(tmp_path):
    data = tiny.phantom()
    tiny.towers(tmp_path, data.samples)
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    write_json(other / "config.json", {"model_type": "bert"})
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    cases = {
        f"dual:{empty},{tmp_path / 'text'}": f"{empty}: there is no config.json",
        f"dual:{tmp_path / 'vision'}": "VISION,TEXT, with one comma",
        f"dual:{tmp_path / 'nowhere'},{tmp_path / 'text'}": "nowhere: no such directory",
        f"blip:{empty}": "there is no config.json",
        f"blip:{write_json(tmp_path / 'bert.json', {'model_type': 'bert'})}": "model_type is 'bert', not 'blip'",
        str(other): "model_type is 'bert'",
        str(broken): "not JSON: line 1, column 2",
        str(empty): "there is no config.json",
        "dul": "this is neither a directory nor a known form; valid: dual",
    }
    for spec, message in cases.items():
        with pytest.raises(FastLNError) as caught:
            load_task(spec, data)
        assert message in str(caught.value), spec


def test_a_checkpoint_with_a_hole_is_refused(tmp_path):
    data = tiny.phantom()
    tiny.towers(tmp_path, data.samples)
    model = AutoModel.from_pretrained(tmp_path / "vision")
    state = model.state_dict()
    hole = next(name for name in state if "layernorm_before" in name)
    model.save_pretrained(tmp_path / "vision", state_dict={k: v for k, v in state.items() if k != hole})
    with pytest.raises(FastLNError, match=f"lacks 1 tensors of its vision encoder, for example {hole}"):
        tiny.dual(tmp_path, data)


@pytest.mark.parametrize(("kind", "cut"), [("dual", ["questions"]), ("blip", ["questions", "answers"])])
def test_texts_that_are_not_read_to_their_end_are_told(kind, cut, tmp_path, caplog):
    data = tiny.phantom()
    task = tiny.TASKS[kind](tmp_path, data)
    assert "cut off" not in caplog.text
    # 64 tokens with the one that ends a question, 14 of an answer.
    fits = replace(data.samples[0], question="is " * 63, answer="no " * 14)
    data.samples[:2] = [fits, replace(fits, id="long", question="is " * 64, answer="no " * 15)]
    task.check_data(data)
    told = [message for message in caplog.messages if "cut off" in message]
    assert [message.split(f"1 of {len(data)} ")[1].split()[0] for message in told] == cut
    assert all(message.endswith("for example that of sample long") for message in told)
    batch = task.collate(data.samples[:2], data)
    assert batch["input_ids"].shape == (2, 64)
    assert torch.equal(*batch["input_ids"])
    assert kind == "dual" or batch["labels"].shape == (2, 16)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_a_model_from_a_configuration_has_the_buffers_that_it_will_be_loaded_with(kind, tmp_path):
    """Rotary frequencies are not saved: rounded to bfloat16 here, they would be others in the saved model."""
    data = tiny.phantom(4)
    task = load_task(tiny_chat.config(tmp_path, kind), data, dtype=torch.bfloat16)
    task.save(tmp_path / "saved")
    again = load_task(str(tmp_path / "saved"), data, dtype=torch.bfloat16)
    loaded = dict(again.model.named_buffers())
    assert loaded.keys() == dict(task.model.named_buffers()).keys()
    assert any("inv_freq" in name for name in loaded)
    for name, buffer in task.model.named_buffers():
        assert buffer.dtype == loaded[name].dtype, name
        assert torch.equal(buffer, loaded[name]), name

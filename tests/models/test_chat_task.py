"""Models that chat: from directories as the hub has them, in batches, trained; and what they refuse."""

import dataclasses
import json
import re

import chat_tokenizers
import pytest
import tiny
import tiny_chat
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    LlavaProcessor,
)
from transformers.image_utils import OPENAI_CLIP_MEAN

from fastln import prepare, save_adapter
from fastln.data import Sample, Source, VQADataset
from fastln.data.images import ImageStat
from fastln.errors import FastLNError
from fastln.models import chat_task, load_task
from fastln.training import TrainConfig, evaluate, train_task
from fastln.training.features import check_frozen
from fastln.training.merge_run import merge_into_base
from fastln.training.tasks import apply_method

QUESTIONS = {
    "What is shown?": "an mri",
    "Is it normal?": "no",
    "Which side is it on?": "left",
    "How many?": "two or so",
}
GREY = {"a": 40, "b": 200}
STATS = {"a": ImageStat(60, 40, 0), "b": ImageStat(30, 90, 0)}


def image(key: str) -> Image.Image:
    return Image.new("RGB", STATS[key][:2], (GREY[key],) * 3)


def dataset(*samples: Sample) -> VQADataset:
    return VQADataset(Source("made", synthetic=True, splits={}, image=image, stats=STATS), "train", list(samples))


def text_data() -> VQADataset:
    return dataset(*(Sample(str(n), "", q, a, closed=None) for n, (q, a) in enumerate(QUESTIONS.items())))


def image_data() -> VQADataset:
    return dataset(
        Sample("short", "a", "What?", "an mri", closed=None),
        Sample("none", "", "Which side is it on?", "left", closed=None),
        Sample("two", "b", "", "two views of a knee", closed=None, views=("a",)),
        Sample("talk", "b", "Is it normal?", "no", closed=None, history=(("What is shown?", "an mri"),)),
    )


@pytest.fixture(autouse=True)
def short_answers(monkeypatch) -> None:
    monkeypatch.setattr(chat_task, "LONG_ANSWER_TOKENS", 12)
    monkeypatch.setattr(chat_task, "ANSWER_TOKENS", 12)


@pytest.mark.parametrize("kind", tiny_chat.CONFIGS)
def test_an_answer_does_not_depend_on_its_batch(kind, tmp_path):
    data = text_data() if kind == "llama" else image_data()
    task = load_task(tiny_chat.config(tmp_path, kind), data, dtype=torch.float64)
    task.model.eval()
    together = task.answers(task.collate(data.samples, data))
    assert together == [task.answers(task.collate([sample], data))[0] for sample in data.samples]
    assert len(set(together)) > 1
    losses = [task.model(**task.collate([sample], data)) for sample in data.samples]
    batch = task.collate(data.samples, data)
    counts = [(row != -100).sum() for row in batch["labels"]]
    mean = sum(out.loss * count for out, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(task.model(**batch).loss, mean)


@pytest.mark.parametrize("kind", tiny_chat.CONFIGS)
def test_a_saved_task_comes_back_and_answers_the_same(kind, tmp_path):
    data = text_data() if kind == "llama" else image_data()
    task = load_task(tiny_chat.config(tmp_path, kind), data)
    task.save(tmp_path / "saved")
    again = load_task(str(tmp_path / "saved"), data)
    assert again.random_weights
    batch, same = (one.collate(data.samples, data) for one in (task, again))
    assert batch.keys() == same.keys()
    assert all(torch.equal(tensor, same[name]) for name, tensor in batch.items())
    assert torch.equal(task.model.eval()(**batch).loss, again.model.eval()(**batch).loss)
    assert task.answers(batch) == again.answers(batch)


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_it_learns_to_answer_and_to_stop(kind, tmp_path):
    data = text_data() if kind == "llama" else dataset(*image_data().samples[:2])
    task = load_task(tiny_chat.config(tmp_path, kind), data)
    config = TrainConfig("full", epochs=60, batch_size=4, learning_rate=1e-2, warmup=0.0)
    train_task(task, data, config, progress=False)
    assert evaluate(task, data).all == 100.0
    batch = task.collate(data.samples, data)
    assert task.answers(batch) == [sample.answer for sample in data.samples]


def test_every_answer_of_a_conversation_has_labels_and_the_last_is_asked_for(tmp_path):
    data = image_data()
    task = load_task(tiny_chat.config(tmp_path, "llava"), data)
    batch = task.collate([data.samples[3]], data)
    assert task.tokenizer.decode(batch["labels"][batch["labels"] != -100]) == "an mri </s> no </s>"
    prompts, _ = task._prompts(batch)
    assert task.tokenizer.decode(prompts["input_ids"][0]).endswith("an mri </s> user : is it normal ? assistant :")


def save_llava(folder, template, *, as_processor=False, **settings):
    """Write a LLaVA as the hub has them: in several files (one for the chat template), or as a processor."""
    tokenizer = chat_tokenizers.byte_level()
    values = {**tiny_chat.CONFIGS["llava"], "image_token_index": tokenizer.convert_tokens_to_ids("<image>"), **settings}
    values["text_config"] = {**values["text_config"], "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(AutoConfig.for_model(**values)).save_pretrained(folder)
    if as_processor:
        LlavaProcessor(CLIPImageProcessorPil(), tokenizer, chat_template=template).save_pretrained(folder)
        return load_task(f"chat:{folder}", image_data())
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    if template:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    return load_task(f"chat:{folder}", image_data())


@pytest.mark.parametrize("as_processor", [False, True])
def test_a_directory_brings_its_template_and_keeps_it(as_processor, tmp_path):
    data = image_data()
    task = save_llava(tmp_path / "hub", chat_tokenizers.LLAVA, as_processor=as_processor)
    assert task.images.processor.image_mean == pytest.approx(OPENAI_CLIP_MEAN)
    batch = task.collate(data.samples[:1], data)
    text = task.tokenizer.decode(batch["input_ids"][0])
    assert text == f"USER: {'<image>' * 4}\nWhat? ASSISTANT: an mri</s>"
    assert batch["pixel_values"].shape == (1, 3, 28, 28)
    assert not task.random_weights
    task.save(tmp_path / "saved")
    save_adapter(prepare(task.model), tmp_path / "adapter")
    merge_into_base(str(tmp_path / "hub"), tmp_path / "adapter", tmp_path / "merged")
    for name in ("saved", "merged"):
        again = load_task(str(tmp_path / name), data)
        assert again.template.source == chat_tokenizers.LLAVA
        same = again.collate(data.samples[:1], data)
        assert all(torch.equal(tensor, same[key]) for key, tensor in batch.items())


@pytest.mark.parametrize("merged", [False, True])
def test_prompts_are_what_transformers_own_processor_makes(merged, tmp_path):
    data = image_data()
    task = save_llava(tmp_path / "hub", chat_tokenizers.LLAVA)
    task.save(tmp_path / "saved")
    if merged:
        save_adapter(prepare(task.model), tmp_path / "adapter")
        merge_into_base(str(tmp_path / "saved"), tmp_path / "adapter", tmp_path / "merged")
    processor = AutoProcessor.from_pretrained(tmp_path / ("merged" if merged else "saved"))
    assert isinstance(processor, LlavaProcessor)
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": chat_task.REPORT_QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    expected = processor(images=[image("b"), image("a")], text=text, return_tensors="pt")
    prompts, _ = task._prompts(task.collate([data.samples[2]], data))
    assert torch.equal(prompts["input_ids"], expected["input_ids"])
    assert torch.equal(prompts["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(
    ("settings", "n_tokens"),
    [
        ({"vision_feature_select_strategy": "full"}, 5),
        ({"vision_feature_layer": [-2, -1]}, 4),
        (
            {
                "vision_feature_select_strategy": "full",
                "vision_config": {**tiny_chat.CLIP, "model_type": "siglip_vision_model"},
            },
            4,
        ),
        ({"text_config": {**tiny_chat.CONFIGS["llava"]["text_config"], "model_type": "mistral"}}, 4),
    ],
)
def test_an_image_takes_as_many_tokens_as_the_model_makes_of_it(settings, n_tokens, tmp_path):
    data = image_data()
    task = save_llava(tmp_path / "hub", None, **settings)
    batch = task.collate([data.samples[2]], data)
    assert (batch["input_ids"] == task.model.config.image_token_id).sum() == 2 * n_tokens
    assert task.model(**batch).loss.isfinite()


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
        (
            "opt",
            {
                "hidden_size": 32,
                "ffn_dim": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "word_embed_proj_dim": 32,
            },
        ),
        ("qwen3", {**tiny_chat.TEXT, "head_dim": 16}),
    ],
)
def test_any_causal_language_model(name, sizes, tmp_path):
    data = text_data()
    ids = {"vocab_size": 64, "bos_token_id": 3, "eos_token_id": 3, "pad_token_id": None}
    (tmp_path / "c.json").write_text(json.dumps({"model_type": name, **sizes, **ids}))
    task = load_task(f"chat:{tmp_path / 'c.json'}", data)
    assert isinstance(task.model, AutoModelForCausalLM._model_mapping[type(task.model.config)])
    train_task(task, data, TrainConfig(epochs=1, batch_size=4), progress=False)
    assert evaluate(task, data).n_all == 4


def test_what_is_too_long_is_told_before_training(tmp_path):
    """Two images of 100 tokens and the report's words are more than the model reads; one image and they are not."""
    large = {**tiny_chat.CONFIGS["llava"], "vision_config": {**tiny_chat.CLIP, "image_size": 140}}
    (tmp_path / "large.json").write_text(json.dumps(large))
    fits = Sample("fits", "a", "", "no effusion " * 60, closed=None)
    load_task(f"chat:{tmp_path / 'large.json'}", dataset(fits))
    two = dataclasses.replace(fits, id="two", views=("b",))
    with pytest.raises(FastLNError) as caught:
        load_task(f"chat:{tmp_path / 'large.json'}", dataset(two, fits, dataclasses.replace(two, id="again")))
    first, *lines = str(caught.value).splitlines()
    assert first == "made train: 2 of 3 samples cannot be used; leave them out, or shorten them:"
    for name, line in zip(("two", "again"), lines, strict=True):
        told = (
            rf"  sample {name} takes \d+ tokens \(200 for its images\), and chat:large reads 256: no answer is cut off"
        )
        assert re.fullmatch(told, line)


def test_images_that_take_too_many_tokens_are_told_without_decoding_them(tmp_path):
    sizes = {"small": (60, 40), "large": (600, 400), "thin": (3000, 10)}
    source = Source("made", True, {}, None, {key: ImageStat(*size, 0) for key, size in sizes.items()})
    samples = [Sample(key, key, "Is it normal?", "no", closed=None) for key in sizes]
    spec = tiny_chat.config(tmp_path, "qwen2_5_vl")
    with pytest.raises(FastLNError) as caught:
        load_task(spec, VQADataset(source, "train", samples))
    first, large, thin = str(caught.value).splitlines()
    assert first.startswith("made train: 2 of 3 samples cannot be used; leave them out, ")
    assert first.endswith(", or have images made smaller (--image-size):")
    assert re.match(r"  sample large takes 3\d\d tokens \(294 for its images\), and chat:qwen2_5_vl reads 256", large)
    assert thin.startswith("  sample thin: image thin: an image of 3000 x 10 pixels: absolute aspect ratio must be")
    load_task(spec, VQADataset(source, "train", samples[:2]), image_size=280)


@pytest.mark.parametrize("image_size", [None, 56, 280])
def test_an_image_has_the_shape_that_is_told_of_it(image_size, tmp_path):
    images = load_task(tiny_chat.config(tmp_path, "qwen2_5_vl"), image_data(), image_size=image_size).images
    for size in ((1, 1), (28, 28), (60, 40), (30, 90), (42, 70), (5, 900), (333, 512), (1100, 1900)):
        made = images.processor(Image.new("RGB", size), return_tensors="pt")["pixel_values"]
        turned = ImageStat(size[1], size[0], 0)
        assert images.shape(ImageStat(*size, 0)) == images.shape(turned) == made.shape


def test_a_batch_draws_no_random_numbers(tmp_path):
    """Else a resumed run, whose first batch is another one, would not end with the same bits."""
    data = image_data()
    task = load_task(tiny_chat.config(tmp_path, "llava"), data)
    task._image_lengths.clear()
    before = torch.get_rng_state()
    task.collate(data.samples, data)
    assert torch.equal(before, torch.get_rng_state())


def test_what_it_cannot_do_is_told(tmp_path):
    for name in ("bert", "llava_mistral"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"model_type": name}))
        with pytest.raises(FastLNError, match=f"model_type is '{name}'; models that chat are llava, qwen2_5_vl and tr"):
            load_task(f"chat:{tmp_path / name}.json", text_data())
    llama, llava = (tiny_chat.config(tmp_path, kind) for kind in ("llama", "llava"))
    images, texts = image_data(), text_data()
    with pytest.raises(
        FastLNError, match="made holds images and several images, which chat:llama cannot take: it reads"
    ):
        load_task(llama, images)
    with pytest.raises(FastLNError, match="holds questions without an image, which blip:tiny cannot take"):
        tiny.blip(tmp_path, texts)
    outside = tiny_chat.CONFIGS["llava"] | {"image_token_index": 32000}
    (tmp_path / "outside.json").write_text(json.dumps(outside))
    with pytest.raises(FastLNError, match="gives <image> the id 32000, but its vocabulary has 256 ids"):
        load_task(f"chat:{tmp_path / 'outside.json'}", images)
    task = load_task(llava, images)
    with pytest.raises(FastLNError, match="'head' trains a task head, and chat:llava has none"):
        apply_method(task, "head")
    with pytest.raises(FastLNError, match="hidden states, which chat:llava does not read: leave the cache out"):
        check_frozen(task, "layernorm", ("decoder",))
    with pytest.raises(FastLNError, match="'prompt' trains virtual tokens, which cannot be saved as part of a model"):
        train_task(load_task(llama, texts), texts, TrainConfig("prompt"), engine="peft", progress=False)
    long = dataclasses.replace(images.samples[0], id="long", answer="no " * 400)
    with pytest.raises(
        FastLNError, match=r"sample long takes \d+ tokens \(4 for its images\), and chat:llava reads 256: no answer"
    ):
        load_task(llava, dataset(*images.samples, long))

"""Conversations as LLaVA's files have them: images in any turn, system turns, rows with and without images."""

import json

import chat_tokenizers
import pytest
import tiny_chat
import torch
from layouts import jpeg, save

from fastln.data import load_source
from fastln.errors import FastLNError
from fastln.models import llava_med, load_task
from fastln.models.chat_template import ChatTemplate
from fastln.training import TrainConfig, train_task
from fastln.training.preview import preview

ROWS = [
    {
        "id": "later",
        "image": ["0.jpg", "1.jpg"],
        "conversations": [
            {"from": "system", "value": "Be brief ."},
            {"from": "human", "value": "Are you there ?"},
            {"from": "gpt", "value": "yes"},
            {"from": "human", "value": "<image>\nWhat is shown ?"},
            {"from": "gpt", "value": "a knee"},
            {"from": "human", "value": "And here ? <image>"},
            {"from": "gpt", "value": "the same"},
        ],
    },
    {"id": "text", "conversations": [{"from": "human", "value": "Who ?"}, {"from": "gpt", "value": "nobody"}]},
    {
        "id": "first",
        "image": "1.jpg",
        "conversations": [{"from": "human", "value": "<image>\nWhat ?"}, {"from": "gpt", "value": "a hip"}],
    },
]
PLACE = {"llava": "<image>", "qwen2_5_vl": "<|vision_start|><image><|vision_end|>"}
MARK = {"llava": "<image>", "qwen2_5_vl": "<|image_pad|>"}
# As PLAIN writes them; [ ] around what is learned, end tokens included.
WRITTEN = {
    "later": "Be brief . USER: Are you there ? ASSISTANT:[ yes</s>]USER: IMAGE\nWhat is shown ? ASSISTANT:[ a knee</s>]"
    "USER: IMAGE\nAnd here ? ASSISTANT:[ the same</s>]",
    "text": "USER: Who ? ASSISTANT:[ nobody</s>]",
    "first": "USER: IMAGE\nWhat ? ASSISTANT:[ a hip</s>]",
}


def dataset(folder, rows=ROWS):
    for number in range(2):
        save(folder / "images" / f"{number}.jpg", jpeg(number))
    save(folder / "train.json", json.dumps(rows).encode())
    return load_source(str(folder)).dataset("train")


def expected(task, kind, sample, n_tokens):
    """The tokens of a conversation and those that are learned, piece by piece from the text above."""
    ids, labels, lengths = [1] if task._first else [], [-100] if task._first else [], iter(n_tokens)
    for piece in WRITTEN[sample.id].replace("[", "|").replace("]", "|").split("|"):
        learned = piece.endswith("</s>")
        before, *rest = piece.replace("IMAGE", PLACE[kind]).split("<image>")
        text = before + "".join(MARK[kind] * next(lengths) + part for part in rest)
        tokens = task.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if learned else [-100] * len(tokens)
    return ids, labels


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_the_tokens_of_a_conversation_written_by_hand(kind, tmp_path):
    data = dataset(tmp_path / "data")
    task = load_task(tiny_chat.config(tmp_path, kind), data)
    batch = task.collate(data.samples, data)
    image = task.model.config.image_token_id
    for row, sample in enumerate(data.samples):
        shapes = [one["pixel_values"].shape for one in task.images.inputs(data, sample.images)]
        ids, labels = expected(task, kind, sample, [task._n_tokens(shape) for shape in shapes])
        length = int(batch["attention_mask"][row].sum())
        assert batch["input_ids"][row, :length].tolist() == ids
        assert batch["labels"][row, :length].tolist() == labels
        assert (batch["labels"][row, length:] == -100).all()
    per_image = [int((row == image).sum()) for row in batch["input_ids"]]
    assert per_image[1] == 0
    assert all(per_image[row] for row in (0, 2))
    words = task.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert words[: 3 + len(task._first)][-3:] == ["be", "brief", "."]
    begins = [index for index, word in enumerate(words) if word == "there"]
    assert image not in batch["input_ids"][0, : begins[0]], "the images stand in the later turns"


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_loss_and_answers_do_not_depend_on_the_rows_beside(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("fastln.models.chat_task.LONG_ANSWER_TOKENS", 6)
    data = dataset(tmp_path / "data")
    task = load_task(tiny_chat.config(tmp_path, kind), data, dtype=torch.float64)
    task.model.eval()
    batches = [task.collate([sample], data) for sample in data.samples]
    assert ["pixel_values" in batch for batch in batches] == [True, False, True]
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    alone = sum(task.model(**batch).loss * count for batch, count in zip(batches, counts, strict=True)) / sum(counts)
    together = task.collate(data.samples, data)
    torch.testing.assert_close(task.model(**together).loss, alone)
    assert task.answers(together) == [task.answers(batch)[0] for batch in batches]
    swapped = {**ROWS[0], "image": ROWS[0]["image"][::-1]}
    other = dataset(tmp_path / "other", [swapped, *ROWS[1:]])
    # In that order of the images; and each belongs to its own turn.
    assert task.model(**task.collate(other.samples[:1], other)).loss != task.model(**batches[0]).loss


@pytest.mark.parametrize("method", ["layernorm", "LN-F-F"])
def test_batches_without_images_train_too(method, tmp_path):
    talk = [{"from": "human", "value": "Who ?"}, {"from": "gpt", "value": "nobody"}]
    rows = [*({"id": str(number), "conversations": talk} for number in range(8)), ROWS[2]]
    data = dataset(tmp_path / "data", rows)
    task = load_task(tiny_chat.config(tmp_path, "llava"), data)
    orders = {}
    for seed in range(60):  # the first batches have no image, longer than the watch over norms waits
        batches = [[data[i] for i in batch] for batch in task.batches(data, 1, seed=seed, questions_per_image=1)]
        orders.setdefault(next(n for n, batch in enumerate(batches) if batch[0].image), seed)
    seed = orders[max(orders)]
    assert max(orders) > 4
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    config = TrainConfig(method, epochs=1, batch_size=1, learning_rate=1e-2, warmup=0.0, seed=seed)
    result = train_task(task, data, config, progress=False)
    assert len(result.losses) == 9
    tower = [n for n in before if "vision_tower" in n and "layer_norm1.weight" in n]
    moved = [not torch.equal(before[name], task.model.state_dict()[name]) for name in tower]
    assert moved[0], "the tower's norms move once a batch has an image"


def test_the_preview_shows_the_batch_as_the_model_reads_it(tmp_path):
    data = dataset(tmp_path / "data")
    task = load_task(tiny_chat.config(tmp_path, "llava"), data)
    text = preview(task, data, TrainConfig(epochs=1, batch_size=3), None)
    assert "are you there ? assistant : yes </s> user : <image> <image> <image> <image> what is shown" in text


SYSTEM_TURNS = (("Q?", "yes"), ("And?", "no"))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("plain", "S. USER: Q? ASSISTANT: yes</s>USER: <image>\nAnd? ASSISTANT: no</s>"),
        ("llava", "SYSTEM: S. USER: Q? ASSISTANT: yes</s> USER: <image>\nAnd? ASSISTANT: no</s>"),
    ],
)
def test_the_template_of_a_model_writes_the_system_turn(template, text):
    tokenizer = chat_tokenizers.byte_level()
    made = ChatTemplate(tokenizer, chat_tokenizers.TEMPLATES[template], "<image>", "{image}")
    assert made.write(SYSTEM_TURNS, [1], places=(1,), system="S.").text == text


def test_llava_meds_own_form_has_a_place_for_it():
    made = ChatTemplate(chat_tokenizers.byte_level(), llava_med.TEMPLATE, "<image>", "{image}")
    assert made.write(SYSTEM_TURNS, [2], places=(0,), system="S.").text == (
        "[INST] <<SYS>>\nS.\n<</SYS>>\n\n<image><image>\nQ? [/INST] yes </s>[INST] And? [/INST] no </s>"
    )


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system') }}{% endif %}", "No system"),
        ("", "has no place for a system turn"),
    ],
)
def test_a_template_without_a_place_for_it_is_told_before_training(template, reason, tmp_path):
    task = load_task(tiny_chat.config(tmp_path, "llama"), dataset(tmp_path / "data", ROWS[1:2]))
    users = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'U: ' + m['content'] + ' ' }}"
        "{% elif m['role'] == 'assistant' %}{{ 'A: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    task.template = ChatTemplate(task.tokenizer, template + users)
    rows = [ROWS[1], {"id": "s", "conversations": [{"from": "system", "value": "S."}, *ROWS[1]["conversations"]]}]
    with pytest.raises(FastLNError, match=r"1 of 2 samples cannot be used") as caught:
        task.check_data(dataset(tmp_path / "with", rows))
    assert "sample s: the chat template " in str(caught.value)
    assert reason in str(caught.value)


def test_a_model_of_one_question_names_what_it_cannot_take(tmp_path):
    data = dataset(tmp_path)
    with pytest.raises(FastLNError, match=r"conversations and .* and system turns, which .* cannot take"):
        load_task("dual", data)
    with pytest.raises(FastLNError, match=r"several images, which .* the first such row is sample later$"):
        load_task(tiny_chat.config(tmp_path, "llama"), data)


def test_tokens_that_would_mislead_are_told_before_training(tmp_path):
    talk = [{"from": "human", "value": "Who ?"}, {"from": "gpt", "value": "no"}]
    rows = [{"id": f"{n}", "conversations": talk} for n in range(2)]
    rows += [
        {"id": "end", "conversations": [talk[0], {"from": "gpt", "value": "a </s> b"}]},
        {"id": "pad", "conversations": [{"from": "human", "value": "What <|image_pad|> ?"}, talk[1]]},
    ]
    with pytest.raises(FastLNError) as caught:
        load_task(tiny_chat.config(tmp_path, "qwen2_5_vl"), dataset(tmp_path / "data", rows))
    assert "2 of 4 samples cannot be used" in str(caught.value)
    assert "sample end: an answer contains </s>, the token that ends it" in str(caught.value)
    assert "sample pad: the conversation has 1 times <|image_pad|> and 0 images" in str(caught.value)

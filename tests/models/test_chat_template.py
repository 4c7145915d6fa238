"""What a conversation becomes as text and as tokens, and which of them are the answers'."""

import itertools

import chat_tokenizers
import pytest
import torch
from chat_tokenizers import IMAGE, TEMPLATES, TOKENIZERS
from tiny_chat import CONFIGS
from transformers import AutoConfig, AutoModelForImageTextToText

from fastln.data import Sample
from fastln.errors import FastLNError
from fastln.models.chat_task import REPORT_QUESTION, ChatTask
from fastln.models.chat_template import ChatTemplate
from fastln.models.chat_vision import CHAT_VISION

TURNS = (("What is shown?", "An MRI of the knee."), ("Is it normal?", "Yes: no effusion,\n\nI am (almost) sure."))
SAMPLE = Sample("s", "a.png", *TURNS[1], closed=None, views=("b.png",), history=TURNS[:1])
ENDS = {"chatml": "<|im_end|>", "thinking": "<|im_end|>"}


def chat(tokenizer, template):
    made = TOKENIZERS[tokenizer]()
    made.chat_template = TEMPLATES[template]
    settings = {**CONFIGS["llava"], "image_token_index": made.convert_tokens_to_ids(IMAGE)}
    settings["text_config"] = {**settings["text_config"], "vocab_size": len(made)}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**settings))
    return ChatTask(model, made, None, name="tiny", vision=CHAT_VISION["llava"])


def runs(labels):
    """Give the labels that stand together."""
    return [list(run) for known, run in itertools.groupby(labels.tolist(), lambda label: label != -100) if known]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_labels_are_the_answers_and_what_ends_them(tokenizer, template):
    task = chat(tokenizer, template)
    ids, labels = task.encode(SAMPLE, [5, 3])
    end = ENDS.get(template, "</s>")
    blank = " " if template == "mistral" else ""
    assert [task.tokenizer.decode(run).lstrip(" ") for run in runs(labels)] == [
        f"{answer}{blank}{end}" for _, answer in TURNS
    ]
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    assert ids.tolist().count(task.model.config.image_token_id) == 8
    assert labels[-1] == task.tokenizer.convert_tokens_to_ids(end), "nothing stands behind the last answer"
    n_first = (ids == task.tokenizer.bos_token_id).sum()
    assert n_first == (tokenizer == "metaspace" or template == "mistral")
    # One text became tokens once: no piece apart from the others.
    text = task.template.write([*TURNS], [5, 3]).text
    whole = task.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.tolist()[-len(whole) :] == whole


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_prompt_is_what_the_question_alone_would_become(tokenizer, template):
    """Prompts are cut out of the tokens with the answer; the answer must not show in them."""
    task = chat(tokenizer, template)
    ids, labels = task.encode(SAMPLE, [5, 3])
    conversation = task.template.write([*TURNS], [5, 3])
    before = conversation.text[: conversation.answers[-1][0]].rstrip(" ")
    alone = task.tokenizer(before, add_special_tokens=False)["input_ids"]
    prompts, n_tokens = task._prompts({"input_ids": ids[None], "labels": labels[None]})
    assert prompts["input_ids"][0, -len(alone) :].tolist() == alone
    assert n_tokens - len(alone) == (tokenizer == "metaspace" and template != "mistral")


def test_the_plain_form_is_llavas():
    made = chat_tokenizers.byte_level()
    template = ChatTemplate(made, None, IMAGE, "{image}")
    assert template.write(TURNS, [2]).text == (
        "USER: <image><image>\nWhat is shown? ASSISTANT: An MRI of the knee.</s>"
        "USER: Is it normal? ASSISTANT: Yes: no effusion,\n\nI am (almost) sure.</s>"
    )


def test_a_report_is_asked_for():
    task = chat("byte level", "plain")
    ids, labels = task.encode(Sample("s", "a.png", "", "The heart is normal.", closed=None), [1])
    assert task.tokenizer.decode(ids[labels == -100]) == f"USER: {IMAGE}\n{REPORT_QUESTION} ASSISTANT:"
    assert task.tokenizer.decode(ids[labels != -100]) == " The heart is normal.</s>"


def test_every_answer_of_odd_text_comes_back():
    task = chat("byte level", "chatml")
    for answer in ("½ Öl, 心臓", "ASSISTANT: x", "{{ 1 }}", "a" * 40, "USER:"):
        _, labels = task.encode(Sample("s", "a.png", "Q?", answer, closed=None), [1])
        assert task.tokenizer.decode(labels[labels != -100]) == f"{answer}<|im_end|>"


@pytest.mark.parametrize(
    ("turns", "n_images", "message"),
    [
        ([("What is <image>?", "x")], 1, "has 2 times <image> and 1 images"),
        ([("What?", "an <image>")], 0, "has 1 times <image> and 0 images"),
    ],
)
def test_image_tokens_in_the_data_are_refused(turns, n_images, message):
    with pytest.raises(FastLNError, match=message):
        ChatTemplate(chat_tokenizers.byte_level(), None, IMAGE, "{image}").write(turns, [4] * n_images)


def test_what_would_mislead_the_labels_is_refused():
    shouting = TEMPLATES["mistral"].replace("message['content'] | trim", "message['content'] | upper")
    with pytest.raises(FastLNError, match="the chat template changes answers"):
        ChatTemplate(chat_tokenizers.byte_level(), shouting).write([("a", "b")])
    forgetful = "{{ messages[0]['content'] }}"
    with pytest.raises(FastLNError, match="the chat template changes answers"):
        ChatTemplate(chat_tokenizers.byte_level(), forgetful).write([("a", "b")])
    with pytest.raises(FastLNError, match="cannot write a conversation: no system"):
        ChatTemplate(chat_tokenizers.byte_level(), "{{ raise_exception('no system') }}")
    endless = chat_tokenizers.byte_level()
    endless.eos_token = None
    with pytest.raises(FastLNError, match="no end token"):
        ChatTemplate(endless, None)
    task = chat("byte level", "plain")
    with pytest.raises(FastLNError, match="sample s: an answer contains </s>"):
        task.encode(Sample("s", "a.png", "Q?", "yes</s>no", closed=None), [1])


def test_nothing_is_cut_off():
    task = chat("byte level", "plain")
    long = Sample("s7", "a.png", "Q?", "no effusion " * 400, closed=None)
    with pytest.raises(
        FastLNError, match=r"s7 takes \d+ tokens \(1 for its images\), and tiny reads 256: no answer is cut off"
    ):
        task.encode(long, [1])

"""Heads and other parts that no checkpoint gave their values: found in loaded models, and nowhere else."""

import copy
import io
import re

import checkpoints
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    EncoderDecoderModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    VisionTextDualEncoderModel,
    ViTForImageClassification,
)

from fastln.families import checkpoint
from fastln.families import heads as heads_module
from fastln.families.heads import RandomParts, random_parts


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return lambda cls, name, **settings: cls.from_pretrained(checkpoints.write(folder, name), **settings)


def heads(*names):
    return RandomParts(names)


def others(*names):
    return RandomParts((), names)


FIVE = {"num_labels": 5, "ignore_mismatched_sizes": True}


@pytest.mark.parametrize(
    ("cls", "name", "settings", "found"),
    [
        (BertForSequenceClassification, "bert", {}, heads("classifier")),
        (BertForSequenceClassification, "bert", {"dtype": torch.float16}, heads("classifier")),
        (BertForSequenceClassification, "bert without pooler", {}, heads("bert.pooler", "classifier")),
        (BertForMaskedLM, "bert", {}, heads("cls.predictions.transform")),
        (BertModel, "bert", {}, heads()),
        (BertModel, "bert without pooler", {}, others("pooler")),  # whether anything reads it is not known
        (ViTForImageClassification, "vit of 3 classes", {}, heads()),
        (ViTForImageClassification, "vit of 3 classes", FIVE, heads("classifier")),
        (LlamaForCausalLM, "llama", {}, heads()),
        (LlamaForCausalLM, "tied llama", {}, heads()),
        (LlamaForCausalLM, "llama without head", {}, heads("lm_head")),
        (LlamaForSequenceClassification, "tied llama", {}, heads("score")),
        (BertModel, "bert", {"max_position_embeddings": 40, "ignore_mismatched_sizes": True}, None),
    ],
)
def test_what_the_checkpoint_lacks_is_found_in_the_model_and_in_a_copy(cls, name, settings, found, load):
    model = load(cls, name, **settings)
    if found is None:
        found = others("embeddings.position_embeddings")
    assert random_parts(model) == found
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    assert random_parts(torch.load(pickled, weights_only=False)) == found
    # A copy has no marks, and names tell enough about heads alone.
    assert random_parts(copy.deepcopy(model)) == heads(*found.heads)
    assert random_parts(model.to(torch.bfloat16)) == found


def test_a_model_made_from_a_configuration_has_no_checkpoint(load, tmp_path):
    assert random_parts(BertForSequenceClassification(checkpoints.BERT)) == RandomParts()
    config = AutoConfig.from_pretrained(checkpoints.write(tmp_path, "bert"))
    assert random_parts(AutoModel.from_config(config)) == RandomParts()
    assert random_parts(BertForSequenceClassification._from_config(config)) == RandomParts()


@pytest.mark.parametrize("name", ["llama", "tied llama"])
def test_resized_embeddings_are_not_random(name, load):
    model = load(LlamaForCausalLM, name)
    model.resize_token_embeddings(70)
    assert random_parts(model) == RandomParts()
    assert random_parts(copy.deepcopy(model)) == RandomParts()


def test_a_head_that_the_caller_put_in_is_random(load):
    model = load(BertForSequenceClassification, "bert")
    model.classifier = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 9))
    assert random_parts(model) == heads("classifier")


def test_parts_between_and_around_models_are_heads_and_what_attends_is_not(load, tmp_path):
    bert, vit = (checkpoints.write(tmp_path, name) for name in ("bert", "vit of 3 classes"))
    both = VisionTextDualEncoderModel.from_vision_text_pretrained(vit, bert)
    assert random_parts(both) == heads("vision_model.pooler", "visual_projection", "text_projection")
    assert random_parts(copy.deepcopy(both)).heads[-2:] == ("visual_projection", "text_projection")
    found = random_parts(EncoderDecoderModel.from_encoder_decoder_pretrained(bert, bert))
    assert found.heads == ("decoder.cls.predictions.transform",)
    assert found.others == tuple(f"decoder.bert.encoder.layer.{n}.crossattention" for n in range(2))

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = load(BertModel, "bert")
            self.mixer = nn.TransformerEncoderLayer(32, 2, 64)
            self.query = nn.Parameter(torch.randn(3))
            self.scale = nn.Parameter(torch.ones(3))  # constant: a start, and not random
            self.head = nn.Linear(32, 4)

    assert random_parts(Around()) == RandomParts(("head",), ("query", "mixer"))
    assert random_parts(copy.deepcopy(Around())) == heads("head")
    new = Around()
    new.encoder = BertModel(checkpoints.BERT)  # in place of what was loaded
    assert random_parts(new) == heads()


def test_names_in_old_and_in_split_checkpoints_are_found(load, tmp_path):
    bert = load(BertModel, "bert")
    old = {re.sub("weight$", "gamma", name) if "Norm" in name else name: p for name, p in bert.state_dict().items()}
    save_file(old, checkpoints.write(tmp_path, "bert") + "/model.safetensors")
    bert.name_or_path = str(tmp_path / "bert")
    assert checkpoint.lacking(bert) == set()
    model = load(LlamaForCausalLM, "llama without head")
    model.base_model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert not (tmp_path / "model.safetensors").exists()
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert checkpoint.lacking(model) == {"lm_head.weight"}
    assert checkpoint.stored_shape(model, "lm_head.weight") is None
    assert checkpoint.stored_shape(model, "model.norm.weight") == (32,)
    model.config._name_or_path = str(tmp_path / "away")
    model.name_or_path = str(tmp_path / "away")
    assert checkpoint.lacking(model) is None
    with pytest.raises(LookupError, match=r"no checkpoint of .*away"):
        checkpoint.stored_shape(model, "lm_head.weight")


def test_what_no_checkpoint_of_the_class_has_and_what_is_offloaded_is_not_random(load, monkeypatch):
    model = load(BertForSequenceClassification, "bert without pooler")
    assert random_parts(model) == heads("bert.pooler", "classifier")
    monkeypatch.setattr(model.bert, "_keys_to_ignore_on_load_missing", [r"pooler\."])
    assert random_parts(model) == heads("classifier")
    model.bert.encoder.to("meta")
    assert random_parts(model) == heads("classifier")
    model.classifier.to("meta")
    assert random_parts(model) == heads()


def test_under_fsdp_the_first_process_tells_the_others(load, monkeypatch):
    """With `cpu_ram_efficient_loading`, transformers marks everything in all processes but the first."""
    model = load(BertForSequenceClassification, "bert")
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    assert random_parts(model) == RandomParts()

    def broadcast(values, src):
        assert src == 0
        values[0] = heads("classifier")

    monkeypatch.setattr(heads_module, "is_fsdp_enabled", lambda: True)
    monkeypatch.setattr(heads_module.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(heads_module.distributed, "broadcast_object_list", broadcast)
    assert random_parts(model) == heads("classifier")

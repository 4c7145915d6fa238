"""LLaVA-Med's own checkpoints: the numbers of transformers' LLaVA, their prompts and pictures, and adapters."""

import json

import chat_tokenizers
import pytest
import tiny_chat
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, LlavaConfig

from fastln.adapters import load_adapter, save_adapter
from fastln.data import Sample, Source, VQADataset
from fastln.data.images import ImageStat
from fastln.errors import FastLNError
from fastln.models import llava_med, load_task
from fastln.prepare import prepare
from fastln.training import TrainConfig, TrainFiles, train_task
from fastln.training.merge_run import merge_into_base

N_WORDS = 128


def original(folder, **changes):
    """Write a checkpoint under the names that LLaVA-Med's code gives its tensors; return transformers' own model."""
    tokenizer = chat_tokenizers.metaspace()
    assert len(tokenizer) >= N_WORDS
    text = {**tiny_chat.TEXT, "model_type": "mistral", "vocab_size": len(tokenizer), "rope_theta": 1e6}
    config = LlavaConfig(vision_config=tiny_chat.CLIP, text_config=text, image_token_index=7)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    new = {"model.vision_tower.": "model.vision_tower.vision_tower.vision_model.", "model.language_model.": "model."}
    new |= {f"model.multi_modal_projector.linear_{n}": f"model.mm_projector.{2 * n - 2}" for n in (1, 2)}
    tensors = {}
    for name, tensor in model.state_dict().items():
        old = next((prefix for prefix in new if name.startswith(prefix)), "")
        tensors[new.get(old, "") + name.removeprefix(old)] = tensor
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tower = folder / "tower"
    CLIPVisionConfig(**tiny_chat.CLIP).save_pretrained(tower)
    values = {
        **text,
        "model_type": "llava_mistral",
        "architectures": ["LlavaMistralForCausalLM"],
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 32,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(tower),
        "tokenizer_model_max_length": 200,
        "use_mm_proj": True,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(values))
    # The original's tokenizer knows no image.
    tokenizer.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("<image>", "<other>"))
    return model


def data() -> VQADataset:
    sample = Sample("1", "tall", "What is shown?", "an mri", closed=None)
    image = Image.new("RGB", (28, 56), (255, 0, 0))
    stats = {"tall": ImageStat(*image.size, 0)}
    source = Source("made", synthetic=True, splits={}, image=lambda key: image, stats=stats)
    return VQADataset(source, "train", [sample])


def test_it_is_transformers_own_model(tmp_path, caplog):
    stock = original(tmp_path / "med")
    task = load_task(f"chat:{tmp_path / 'med'}", data())
    batch = task.collate(data().samples, data())
    text = task.tokenizer.decode(batch["input_ids"][0])
    assert text == f"<s> [INST] {'<image>' * 4}\nWhat is shown? [/INST] an mri </s>"
    assert task.max_tokens == 200
    assert not caplog.records
    # The background of CLIP's mean colour, left and right: normalised it is about 0.
    left, middle = batch["pixel_values"][0, :, :, :5], batch["pixel_values"][0, :, :, 9:19]
    assert left.abs().max() < 0.02
    assert middle[0].min() > 1.5
    image_id = task.model.config.image_token_id
    assert image_id == stock.config.text_config.vocab_size
    with torch.no_grad():
        logits = task.model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits
        ids = batch["input_ids"].masked_fill(batch["input_ids"] == image_id, stock.config.image_token_id)
        expected = stock(input_ids=ids, pixel_values=batch["pixel_values"]).logits
    assert torch.equal(logits[..., :image_id], expected)
    torch.testing.assert_close(logits[..., image_id], expected.mean(dim=-1))


def test_adapters_fit_it_and_the_merged_model_is_transformers(tmp_path):
    original(tmp_path / "med")
    spec = f"chat:{tmp_path / 'med'}"
    task = load_task(spec, data())
    train_task(
        task, data(), TrainConfig(epochs=3, batch_size=1, learning_rate=1e-2), TrainFiles(adapter=tmp_path / "adapter")
    )
    task.save(tmp_path / "saved")
    merge_into_base(str(tmp_path / "med"), tmp_path / "adapter", tmp_path / "merged")
    saved, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "merged"))
    assert saved.keys() == merged.keys()
    assert "vision_tower.embeddings.class_embedding" in saved
    assert all(torch.equal(merged[name], tensor) for name, tensor in saved.items())
    expected = task.collate(data().samples, data())
    for name in ("saved", "merged"):
        again = load_task(str(tmp_path / name), data())
        batch = again.collate(data().samples, data())
        assert all(torch.equal(tensor, batch[key]) for key, tensor in expected.items())
        assert AutoProcessor.from_pretrained(tmp_path / name).image_processor.do_pad
    base = prepare(load_task(spec, data()).model)
    load_adapter(base, tmp_path / "adapter")
    save_adapter(base, tmp_path / "again")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_the_tower_of_the_published_checkpoint_is_known():
    config = llava_med._config("-", {"mm_vision_tower": "openai/clip-vit-large-patch14-336"})
    assert config.vision_config.image_size == 336
    assert config.vision_config.num_hidden_layers == 24
    assert config.vision_feature_layer == -2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'; transformers' LLaVA takes only 'mlp2x_gelu'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True; transformers' LLaVA takes only False"),
        ({"num_hidden_layers": 3}, "the checkpoint lacks 9 tensors of its LLaVA-Med, for example model.language_model"),
    ],
)
def test_what_it_cannot_load_is_told(changes, message, tmp_path):
    original(tmp_path / "med", **changes)
    with pytest.raises(FastLNError, match=message):
        load_task(f"chat:{tmp_path / 'med'}", data())


def test_weights_that_are_pickled_are_not_read(tmp_path):
    original(tmp_path / "med")
    (tmp_path / "med" / "model.safetensors").rename(tmp_path / "med" / "pytorch_model.bin")
    with pytest.raises(FastLNError, match=r"cannot be loaded: .*safetensors"):
        load_task(f"chat:{tmp_path / 'med'}", data())

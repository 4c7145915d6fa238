"""Images of another size than a model's own: which positions are interpolated, what remembers the size, refusals."""

import copy

import pytest
import tiny
import tiny_chat
import torch
from layouts import LAYOUTS
from torch.nn import functional
from transformers import (
    Aimv2VisionConfig,
    AutoModel,
    BlipForQuestionAnswering,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
)

import fastln
from fastln.data import load_dataset
from fastln.errors import FastLNError
from fastln.families import find_norms
from fastln.fingerprint import fingerprint
from fastln.models import load_task
from fastln.models.image_size import INTERPOLATE

OWN, OTHER = 32, 48  # of the tiny models, in patches of 8
SIZES = {**tiny.SIZES, "image_size": OWN, "patch_size": 8}


@pytest.fixture
def data():
    return tiny.phantom(6)


def blip(folder, data, image_size):
    tiny.blip_config().to_json_file(folder / "blip.json")
    task = load_task(f"blip:{folder / 'blip.json'}", data, dtype=torch.float64, image_size=image_size)
    task.model.eval()
    return task


def dual(folder, config, data, image_size):
    if not (folder / "text").exists():
        tiny.towers(folder, data.samples)
    torch.manual_seed(0)
    AutoModel.from_config(copy.deepcopy(config)).save_pretrained(folder / "other")
    task = load_task(f"dual:{folder / 'other'},{folder / 'text'}", data, image_size=image_size)
    task.model.eval()
    return task


def interpolated(positions, n_before, n_edge):
    """Positions (1, n_before + n², n_cols) for n_edge² patches, bicubic; those before the patches stay."""
    patches = positions[:, n_before:]
    edge = round(patches.shape[1] ** 0.5)
    grid = patches.unflatten(1, (edge, edge)).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=(n_edge, n_edge), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :n_before], grid.flatten(2).mT], dim=1)


@pytest.mark.parametrize("image_size", [OTHER, 24])
def test_blip_is_the_model_of_that_size_with_interpolated_positions(image_size, tmp_path, data):
    task = blip(tmp_path, data, image_size)
    batch = task.collate(data.samples, data)
    assert batch["pixel_values"].shape[2:] == (image_size, image_size)
    config = copy.deepcopy(task.model.config)
    config.vision_config.image_size = image_size
    model = BlipForQuestionAnswering(config).double().eval()
    name = "vision_model.embeddings.position_embedding"
    state = task.model.state_dict()
    model.load_state_dict(state | {name: interpolated(state[name], 1, image_size // 8)})
    stock = {key: value for key, value in batch.items() if key != INTERPOLATE}
    torch.testing.assert_close(task.model(**batch).loss, model(**stock).loss, rtol=1e-12, atol=0)
    written = model.generate(
        stock["input_ids"], stock["pixel_values"], stock["attention_mask"], max_new_tokens=16, do_sample=False
    )
    assert task.answers(batch) == task.tokenizer.batch_decode(written[:, 1:], skip_special_tokens=True)


@pytest.mark.parametrize("prepared", [False, True])
def test_interpolation_at_the_own_size_is_the_identity_and_is_not_asked_for(prepared, tmp_path, data):
    task = blip(tmp_path, data, OWN)
    batch = task.collate(data.samples, data)
    assert INTERPOLATE not in batch
    model = fastln.prepare(task.model) if prepared else task.model
    assert torch.equal(model(**batch).loss, model(**batch, **{INTERPOLATE: True}).loss)


def test_gradients_reach_every_norm_at_another_size(tmp_path, data):
    task = blip(tmp_path, data, OTHER)
    before = fingerprint(task.model)
    assert before == fingerprint(blip(tmp_path, data, None).model)
    batch = task.collate(data.samples, data)
    norms = [parameter for _, norm in find_norms(task.model) for parameter in norm.parameters()]
    stock = torch.autograd.grad(task.model(**batch).loss, norms)
    model = fastln.prepare(task.model)
    model(**batch).loss.backward()
    trained = [parameter for _, norm in find_norms(model) for parameter in norm.parameters()]
    for parameter, expected in zip(trained, stock, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12 * expected.norm().item())


TOWERS = {
    "vit": ViTConfig(**SIZES),
    "clip": CLIPVisionConfig(**SIZES),
    "deit": DeiTConfig(**SIZES),
    "siglip": SiglipVisionConfig(**SIZES),
    "swin": SwinConfig(
        image_size=OWN,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
        use_absolute_embeddings=True,
    ),
    "dinov2": Dinov2Config(**SIZES),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_a_dual_encoder_reads_what_its_vision_encoder_makes_of_the_size(kind, tmp_path, data):
    task = dual(tmp_path, TOWERS[kind], data, OTHER)
    batch = task.collate(data.samples, data)
    asked = {} if kind == "dinov2" else {INTERPOLATE: True}
    assert {name: batch[name] for name in batch if name == INTERPOLATE} == asked
    pixels = batch["pixel_values"]
    assert pixels.shape[2:] == (OTHER, OTHER)
    tower = AutoModel.from_pretrained(tmp_path / "other").eval()
    with torch.no_grad():
        features, logits = task.model.vision_features(pixels, **asked), task.model(**batch).logits
        hidden = tower(pixel_values=pixels, **asked).last_hidden_state
        head = task.model.fusion_head(
            features[batch["image_index"]], task.model.text_features(batch["input_ids"], batch["attention_mask"])
        )
    mean = functional.layer_norm(hidden.mean(dim=1), hidden.shape[-1:])
    torch.testing.assert_close(features[:, hidden.shape[-1] :], mean)
    torch.testing.assert_close(logits, head)


@pytest.mark.parametrize("kind", ["blip", "dual"])
def test_what_is_saved_knows_the_size_and_can_be_told_another(kind, tmp_path, data):
    task = blip(tmp_path, data, OTHER) if kind == "blip" else dual(tmp_path, TOWERS["vit"], data, OTHER)
    task.save(tmp_path / "saved")
    for asked, size in ((None, OTHER), (OWN, OWN), (24, 24)):
        again = load_task(str(tmp_path / "saved"), data, dtype=task.model.dtype, image_size=asked)
        batch = again.collate(data.samples, data)
        assert batch["pixel_values"].shape[2:] == (size, size)
        assert (INTERPOLATE in batch) == (size != OWN)
        assert fingerprint(again.model) == fingerprint(task.model)


def test_qwen_bounds_the_pixels_of_an_image(tmp_path):
    data = load_dataset(LAYOUTS["plain, jsonl"].make(tmp_path / "data"), "train")  # 48 x 64 pixels
    spec = tiny_chat.config(tmp_path, "qwen2_5_vl")
    task = load_task(spec, data, image_size=28)
    assert len(task.collate(data.samples, data)["pixel_values"]) == 4 * len(data), "patches of 14 x 14 pixels"
    assert len(load_task(spec, data).collate(data.samples, data)["pixel_values"]) > 4 * len(data)
    task.save(tmp_path / "saved")
    again = load_task(str(tmp_path / "saved"), data)
    assert len(again.collate(data.samples, data)["pixel_values"]) == 4 * len(data)
    assert str(again.images) == "784 to 784 pixels each"


@pytest.mark.parametrize(
    ("image_size", "nearest"), [(50, "48 or 56"), (7, "8"), (0, "8"), (-16, "8"), (33, "32 or 40")]
)
@pytest.mark.parametrize("kind", ["blip", "dual"])
def test_a_size_that_is_cut_into_no_whole_patches_is_refused_with_the_nearest(
    kind, image_size, nearest, tmp_path, data
):
    with pytest.raises(FastLNError) as caught:
        blip(tmp_path, data, image_size) if kind == "blip" else dual(tmp_path, TOWERS["vit"], data, image_size)
    assert f"image size {image_size}: it must be a multiple of 8" in str(caught.value)
    assert str(caught.value).endswith(f"the nearest: {nearest}")


def test_an_own_size_that_is_no_multiple_stays(tmp_path, data):
    """SigLIP of 384 pixels in patches of 14."""
    task = dual(tmp_path, SiglipVisionConfig(**SIZES | {"image_size": 35}), data, 35)
    assert task.model(**task.collate(data.samples, data)).loss.isfinite()


def test_models_that_cannot_say_so(tmp_path, data):
    with pytest.raises(FastLNError, match="image size 48: Aimv2VisionModel takes only images of its own size"):
        dual(tmp_path, Aimv2VisionConfig(**SIZES), data, OTHER)
    dual(tmp_path, Aimv2VisionConfig(**SIZES), data, OWN)
    images = load_dataset(LAYOUTS["plain, jsonl"].make(tmp_path / "data"), "train")
    llava, qwen, llama = (tiny_chat.config(tmp_path, kind) for kind in ("llava", "qwen2_5_vl", "llama"))
    load_task(llava, images, image_size=28)
    for spec, message in (
        (llava, "image size 56: this LLaVA reads only images of 28 x 28 pixels"),
        (qwen, "image size 50: it must be a multiple of 28"),
        (llama, "image size 56: chat:llama reads only text"),
    ):
        with pytest.raises(FastLNError, match=message):
            load_task(spec, images, image_size=50 if spec == qwen else 56)

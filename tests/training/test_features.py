"""The feature cache: the same bits as without it, keys that notice every change, refusals, and what it saves."""

import copy

import pytest
import tiny
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

import fastln
from fastln.errors import FastLNError
from fastln.training import TensorStore, TrainConfig, cached_features, evaluate, predict, train_task
from fastln.training.features import fingerprint
from fastln.training.run import TrainRun, run_training

CONFIG = TrainConfig(scope=("text",), epochs=2, head_epochs=1, batch_size=8, questions_per_image=2)


@pytest.fixture
def store(tmp_path):
    return TensorStore(tmp_path / "cache", "64MiB")


def counted(tower):
    """Count the images that the tower's own code sees."""
    seen = []
    tower.embeddings.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    return seen


def files(store):
    return sorted(store.directory.glob("*/*.safetensors"))


@pytest.mark.parametrize(
    ("kind", "engine", "dtype"),
    [
        ("dual", "fastln", torch.float32),
        pytest.param("dual", "fastln", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("dual", "peft", torch.float32, marks=pytest.mark.slow),
        ("blip", "fastln", torch.bfloat16),
        pytest.param("blip", "torch", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_losses_and_weights_are_those_without_the_cache(kind, engine, dtype, tmp_path, store):
    data = tiny.phantom(32)
    results, weights, answers = [], [], []
    for features in (None, store, store):
        task = tiny.TASKS[kind](tmp_path / kind if kind == "blip" else tmp_path, data, dtype)
        seen = counted(task.vision_tower)
        results.append(train_task(task, data, CONFIG, engine=engine, progress=False, features=features).losses)
        answers.append(predict(task, data, features=features))
        weights.append(task.model.state_dict())
        if features is store:
            n_images = len({sample.image for sample in data.samples})
            # In training; in the head's epochs and the evaluation; four for each of the two checks.
            assert sum(seen) == (2 * n_images + 2 * 4 if len(results) == 2 else 0)
    assert results[0] == results[1] == results[2]
    assert answers[0] == answers[1] == answers[2]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
        assert torch.equal(tensor, weights[2][name]), name
    assert len(set(results[0])) > 1


@pytest.mark.slow(take=1)
@pytest.mark.parametrize("kind", tiny.TASKS)
def test_interpolated_positions_are_cached_as_the_others(kind, tmp_path, store):
    data = tiny.phantom(16)
    losses, answers = [], []
    for features in (None, store, store):
        task = tiny.TASKS[kind](tmp_path / kind if kind == "blip" else tmp_path, data)
        task.save(tmp_path / "base")
        task = tiny.load_task(str(tmp_path / "base"), data, image_size=48)
        seen = counted(task.vision_tower)
        losses.append(train_task(task, data, CONFIG, progress=False, features=features).losses)
        answers.append(predict(task, data, features=features))
    assert not seen
    assert losses[0] == losses[1] == losses[2]
    assert answers[0] == answers[1] == answers[2]


def vit(**settings):
    torch.manual_seed(0)
    config = ViTConfig(**tiny.SIZES, image_size=32, patch_size=8, **settings)
    return ViTModel(config, add_pooling_layer=True).eval().requires_grad_(False)


def siglip():
    torch.manual_seed(0)
    config = SiglipVisionConfig(**tiny.SIZES, image_size=32, patch_size=8)
    return SiglipVisionModel(config).eval().requires_grad_(False)


def dinov2():
    torch.manual_seed(0)
    config = Dinov2Config(**tiny.SIZES, image_size=32, patch_size=8)
    return Dinov2Model(config).eval().requires_grad_(False)


@pytest.mark.parametrize("make", [vit, siglip, dinov2])
def test_the_pooled_rows_are_computed_in_their_batch(make, store):
    """One row an image: a matrix product rounds it differently in a batch of another size."""
    tower = make()
    images = torch.randn(6, 3, 32, 32)
    with cached_features(tower, store):
        for some in (images[:1], images[1:4], images[3:]):
            tower(pixel_values=some)
        got = tower(pixel_values=images)
    expected = tower(pixel_values=images)
    assert torch.equal(got.pooler_output, expected.pooler_output)
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)


def test_a_module_that_is_called_like_the_pooling_and_is_none(store):
    class Tower(nn.Module):
        config = None

        def __init__(self):
            super().__init__()
            self.embeddings = nn.Linear(16, 8)
            self.pooler = nn.Linear(8, 4)

        def forward(self, pixel_values):
            hidden = self.embeddings(pixel_values.flatten(2))
            return type("Output", (), {"last_hidden_state": hidden, "pooler_output": self.pooler(hidden[:, 0])})

    tower = Tower().requires_grad_(False)
    images = torch.randn(4, 3, 4, 4)
    expected = tower(images)
    for _ in range(2):
        with cached_features(tower, store):
            for _ in range(2):
                got = tower(images)
                assert torch.equal(got.pooler_output, expected.pooler_output)
                assert torch.equal(got.last_hidden_state, expected.last_hidden_state)


def test_an_image_twice_in_a_batch_is_computed_once(store):
    tower = vit()
    seen = counted(tower)
    images = torch.randn(3, 3, 32, 32)
    expected = tower(images[[0, 1, 0, 0, 2]]).last_hidden_state
    del seen[:]
    with cached_features(tower, store):
        got = tower(images[[0, 1, 0, 0, 2]]).last_hidden_state
    assert torch.equal(got, expected)
    assert seen == [1, 3, 3], "the check's two passes, and one over what is new"
    assert len(files(store)) == 3


def test_every_change_that_matters_is_another_key(store):
    images = torch.randn(2, 3, 32, 32)
    base = vit()

    def n_new(tower, pixels=images, grad=True, **arguments):
        before = len(files(store))
        with torch.set_grad_enabled(grad), cached_features(tower, store):
            got = tower(pixel_values=pixels, **arguments).last_hidden_state
        with torch.set_grad_enabled(grad):
            assert torch.equal(got, tower(pixel_values=pixels, **arguments).last_hidden_state)
        return len(files(store)) - before

    assert n_new(base) == 2
    assert n_new(base) == n_new(vit()) == n_new(copy.deepcopy(base)) == 0
    other = images.clone()
    other[1, 0, 0, 0] += 1e-3
    assert n_new(base, other) == 1
    weights = vit()
    weights.embeddings.cls_token[0, 0, 0] += 1e-3
    assert n_new(weights) == 2
    assert n_new(vit(layer_norm_eps=1e-3)) == 2
    assert n_new(vit(hidden_act="relu")) == 2
    assert n_new(base.bfloat16(), images.bfloat16()) == 2
    assert n_new(vit().train()) == 2
    assert n_new(vit(), grad=False) == 2
    assert n_new(vit(), interpolate_pos_encoding=False) == 0
    assert n_new(vit(), interpolate_pos_encoding=True) == 2
    prepared = fastln.prepare(nn.ModuleDict({"vision": vit(), "text": nn.LayerNorm(8)}), scope="text")["vision"]
    assert n_new(prepared) == 2
    assert fingerprint(prepared) != fingerprint(vit())


def test_a_model_that_was_saved_and_loaded_is_the_same_tower(tmp_path, store):
    data = tiny.phantom(12)
    task = tiny.dual(tmp_path, data)
    evaluate(task, data, features=store)
    n_files = len(files(store))
    task.save(tmp_path / "saved")
    again = tiny.load_task(str(tmp_path / "saved"), data)
    evaluate(again, data, features=store)
    assert len(files(store)) == n_files == len({sample.image for sample in data.samples})


def test_another_preprocessing_is_another_key(tmp_path, store):
    data = tiny.phantom(12)
    for mean in (0.5, 0.4):
        task = tiny.dual(tmp_path, data)
        task.images.processor.image_mean = [mean] * 3
        evaluate(task, data, features=store)
    assert len(files(store)) == 2 * len({sample.image for sample in data.samples})


def test_damaged_files_and_a_full_store_change_no_loss(tmp_path, caplog):
    data = tiny.phantom(24)
    small = TensorStore(tmp_path / "small", 3 * 4096)
    whole = TensorStore(tmp_path / "whole", "1MiB")
    losses = []
    for features in (None, whole, whole, small):
        losses.append(train_task(tiny.dual(tmp_path, data), data, CONFIG, progress=False, features=features).losses)
        for path in files(whole)[::2]:
            path.write_bytes(path.read_bytes()[:-7])
    assert losses[0] == losses[1] == losses[2] == losses[3]
    assert "is damaged" in caplog.text
    assert 0 < sum(path.stat().st_size for path in files(small)) <= 3 * 4096


def test_the_tower_is_its_own_again_afterwards(tmp_path, store):
    tower = vit()
    with pytest.raises(AttributeError), cached_features(tower, store):
        tower("no image")
    assert "forward" not in tower.__dict__
    tower.forward = before = tower.forward
    with cached_features(tower, store):
        assert tower.forward is not before
    assert tower.forward == before


def test_a_call_for_more_than_features_is_the_towers_own(store):
    tower = vit()
    with cached_features(tower, store):
        assert len(tower(torch.randn(1, 3, 32, 32), output_hidden_states=True).hidden_states) == 3
    assert not files(store)


@pytest.mark.parametrize("method", ["layernorm", "full", "lora"])
@pytest.mark.parametrize("scope", [None, ("text", "vision")])
def test_a_vision_tower_that_trains_is_refused_before_anything_is_written(method, scope, tmp_path, store):
    tiny.towers(tmp_path, tiny.phantom().samples)
    model = f"dual:{tmp_path / 'vision'},{tmp_path / 'text'}"
    run = TrainRun("phantom", model, None, TrainConfig(method, scope))
    with pytest.raises(FastLNError, match=f"method '{method}' trains some of it .*--scope text"):
        run_training(run, tmp_path / "out", features=store)
    assert not (tmp_path / "out").exists()


class NoTower(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values):
        return self.inner(pixel_values)


def test_what_cannot_be_cached_says_why(store):
    images = torch.randn(2, 3, 32, 32)
    for tower, reason in (
        (vit(hidden_dropout_prob=0.1).train(), "ViTModel draws random numbers in training"),
        (vit().requires_grad_(True), "ViTModel trains .* so its features change"),
        (NoTower(nn.BatchNorm2d(3)).requires_grad_(False), "NoTower computes statistics over the batch in training"),
        (NoTower(nn.Identity()), "NoTower gives no last_hidden_state with a row for each image"),
    ):
        with cached_features(tower, store), pytest.raises(FastLNError, match=reason):
            tower(images)
    assert not files(store)
    # Where nothing is drawn and nothing trains, the same towers may be.
    for tower in (vit(hidden_dropout_prob=0.1), vit().requires_grad_(True)):
        with cached_features(tower, store), torch.no_grad():
            tower(images)
    assert len(files(store)) == 4


def test_a_tower_that_rounds_by_batch_size_is_named(store, caplog):
    class Tower(nn.Module):
        def forward(self, pixel_values):
            hidden = pixel_values.flatten(2) + 1e-6 * len(pixel_values)
            return type("Output", (), {"last_hidden_state": hidden})

    tower = Tower()
    with cached_features(tower, store):
        tower(torch.randn(2, 3, 4, 4))
        tower(torch.randn(2, 3, 4, 4))
    assert caplog.text.count("Tower rounds an image's features differently in batches of different sizes") == 1

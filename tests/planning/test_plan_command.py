"""`fastln plan`: what it prints, what it writes, and what it refuses in one line."""

import json

import pytest
import torch
import transformers
from tiny import SIZES, blip_config

from fastln import cli
from fastln.models.example import BatchSize, example
from fastln.models.outline import outline
from fastln.peak import step_memory
from fastln.plan import apply, plan
from fastln.planning import forecast as forecasts
from fastln.planning.accuracy import accuracy_table
from fastln.planning.candidate import Candidate
from fastln.settings import MethodSettings


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    monkeypatch.setattr(forecasts, "this_cpu", lambda: forecasts.replace(forecasts.find_device("T4"), name="cpu"))


@pytest.fixture
def bert(tmp_path):
    config = transformers.BertConfig(**SIZES, vocab_size=64)
    config.architectures = ["BertForMaskedLM"]
    config.to_json_file(tmp_path / "bert.json")
    return tmp_path / "bert.json"


def run(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["fastln", "plan", *map(str, words)])
    cli.main()


def test_a_plan_says_what_it_predicts_and_writes_it(bert, tmp_path, monkeypatch, capsys):
    files = ["--json", tmp_path / "plan.json", "--picture", tmp_path / "plan.png"]
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--model", bert, "--batch-size", 4, "--text-length", 16, "--device", "rtx4090", *files)
    assert end.value.code == 0
    out = capsys.readouterr().out
    for words in ("every number is predicted", "4 samples of 16 tokens", "peak, in the", "RTX 4090", "by layer"):
        assert words in out.replace("\n", " "), words
    assert "24.00 GiB of RTX 4090" in out
    for row in ("layernorm/fastln", "stock layernorm/torch", "lora/peft", "QLoRA", "full/torch", "recompute", "take: "):
        assert row in out, row
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["predicted"] is True
    assert found["ours"]["largest_batch"] > 4
    assert found["take"] in {row["activations"] for row in found["storage_modes"]}
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_the_plan_is_that_of_prepare_on_meta(bert):
    found = Candidate(str(bert), MethodSettings.of(activations="recompute"), "float32")
    size = BatchSize(4, text_length=16)
    model = outline(str(bert)).train()
    arguments = example(model, size).arguments
    apply(plan(model, activations="recompute", device="cpu"), model)
    assert found.memory(size) == step_memory(model, arguments)


def test_four_bits_take_the_place_of_frozen_linear_weights(bert):
    lora = MethodSettings.of("lora", "peft")
    whole, four = (
        Candidate(str(bert), lora, "bfloat16", four_bits=bits).memory(BatchSize(2)) for bits in (False, True)
    )
    numbers = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 32  # of two blocks, and the head's transform
    assert whole.weights - four.weights == pytest.approx(numbers * (2 - 4.127 / 8), rel=1e-3)
    assert four.workspace == whole.workspace + 2 * 64 * 32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "10KB"], "is below the weights alone"),
        (["--device", "RTX 4080"], "unknown device 'RTX 4080'; did you mean"),
        (["--activations", "recompte"], "unknown activations 'recompte' (did you mean 'recompute'?)"),
        (["--activations", "offload"], "activations 'offload' cannot be planned"),
        (["--products", "int4"], "unknown products 'int4'"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--method", "lorra"], "unknown method 'lorra'"),
        (["--image-size", "32"], "reads no images"),
        (["--text-length", "9999"], "has positions for 512 tokens"),
        (["--memory", "much"], "'much' is not a valid size"),
    ],
)
def test_what_cannot_be_planned_is_one_line(words, message, bert, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "--model", bert, *words)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_directory_without_a_configuration_is_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--model", tmp_path)
    assert "there is no config.json in this directory" in capsys.readouterr().err


def test_a_budget_that_nothing_fits_names_the_least_and_the_largest_batch(bert, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--model", bert, "--batch-size", 512, "--text-length", 64, "--memory", "30MB")
    out = capsys.readouterr().out
    assert "no mode fits 512 samples: the least is" in out
    assert "the largest batch that fits is" in out


@pytest.fixture
def blip(tmp_path):
    config = blip_config()
    config.architectures = ["BlipForQuestionAnswering"]
    config.to_json_file(tmp_path / "blip.json")
    return tmp_path / "blip.json"


def test_images_are_of_the_size_asked_for_and_data_gives_an_epoch(blip, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--model", blip, "--batch-size", 2, "--image-size", 48, "--data", "phantom")
    out = capsys.readouterr().out
    assert "2 samples of an image of 48²" in out
    assert "minutes per epoch" in out
    assert "for want of a tokenizer" in out


def test_images_grow_until_the_budget_is_reached(blip):
    candidate, size = Candidate(str(blip), MethodSettings.of(), "float32"), BatchSize(2)
    batch = candidate.batch(size)
    wanted = candidate.memory(BatchSize(2, image_size=batch.image_size + 2 * batch.step)).peak
    maker = forecasts._Maker(forecasts.find_device("T4"), wanted, size, size)
    assert maker.largest_image(candidate, batch) == batch.image_size + 2 * batch.step


def test_an_encoder_without_a_head_is_planned_by_all_that_it_returns(tmp_path):
    config = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8)
    config.architectures = ["ViTModel"]
    config.to_json_file(tmp_path / "vit.json")
    assert Candidate(str(tmp_path / "vit.json"), MethodSettings.of(), "float32").memory(BatchSize(2)).saved_bytes > 0


def test_the_table_of_the_accuracy(tmp_path):
    row = {"model": "ViT", "batch_size": 8, "size": 224, "method": "layernorm", "engine": "fastln", "dtype": "float32"}
    row |= {"activations": "exact", "products": "int8", "predicted_peak_bytes": 102 << 20}
    row |= {"measured_peak_bytes": 100 << 20, "step_seconds": 2.0, "predicted_step_seconds": 1.5}
    machine = {"cpu": "some processor", "threads": 2}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"provenance": {"machine": machine}, "rows": [row]}))
    text = accuracy_table((tmp_path / "none", path))
    assert "some processor, 2 threads" in text
    assert "+2.0%" in text
    assert "-25%" in text
    assert "step times: 1 combinations, the largest error 25.0%" in text


def test_labels_have_values_and_nothing_else_is_read():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        )
    made = example(model, BatchSize(3, text_length=20))
    assert (made.arguments["labels"] != -100).sum(1).tolist() == [8, 8, 8]
    assert made.describe() == "3 samples of 20 tokens, 8 labels"

"""A head that was not in the checkpoint trains under every method and engine, is told, and is in the adapter."""

import logging

import checkpoints
import pytest
import torch
from small_run import arguments
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, BertForSequenceClassification, BertModel, LlamaForCausalLM

import fastln
from fastln import FastLNError, FastLNTrainer
from fastln.engines import load_trained_adapter, put_method, save_trained_adapter, to_stock
from fastln.training import MasterAdamW
from fastln.training.fastln_trainer import logger as trainer_logger

HEAD = {"classifier.weight", "classifier.bias"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def bert(folder):
    return lambda **settings: BertForSequenceClassification.from_pretrained(
        checkpoints.write(folder, "bert"), **settings
    )


@pytest.fixture
def vit(folder):
    source = checkpoints.write(folder, "vit of 3 classes")
    return lambda: AutoModelForImageClassification.from_pretrained(source, num_labels=2, ignore_mismatched_sizes=True)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_prepare_trains_it_and_says_why(bert, caplog):
    model = bert()
    plan = fastln.plan(model)
    assert plan.also == ("classifier",)
    (entry,) = (change for change in plan.changes if change.name == "classifier" and change.trick == "random_heads")
    assert entry.reason == "it was not in the checkpoint"
    assert "without='random_heads'" in plan.table()
    with caplog.at_level(logging.INFO, "fastln"):
        fastln.prepare(model)
    said = "trains whole, because the checkpoint lacks it: classifier (without='random_heads' freezes it)"
    assert [record.message for record in caplog.records].count(said) == 1
    assert trained(model) >= HEAD
    fastln.restore(model)
    assert fastln.plan(model) == plan


def test_it_can_be_left_out(bert, caplog):
    with caplog.at_level(logging.INFO, "fastln"):
        model = fastln.prepare(bert(), without="random_heads")
    assert not trained(model) & HEAD
    assert "1 random head (left out: without='random_heads')" in caplog.text
    with pytest.raises(FastLNError, match="trains nothing by itself"):
        fastln.plan(bert(), "head", without="random_heads")


def test_a_scope_may_leave_it_out_by_name(bert):
    plan = fastln.plan(bert(), scope="not:classifier")
    assert not plan.trained & HEAD
    assert ("classifier", "the scope leaves it out") in [(stay.name, stay.reason) for stay in plan.stays]
    assert fastln.plan(bert(), scope=["bert.encoder.layer.1", "not:*.intermediate"]).trained >= HEAD
    assert not trained(put_method(bert(), "bitfit", "torch", scope="not:classifier")) & HEAD


@pytest.mark.parametrize("method", ["full", "head", "T"])
def test_a_method_that_trains_it_is_left_as_it_is(method, bert):
    model = bert()
    plan = fastln.plan(model, method)
    assert plan.trained >= HEAD
    assert plan.also == (("classifier",) if method == "head" else ())


ENGINES = [
    *("layernorm/fastln", "layernorm/torch", "layernorm/peft", "bitfit/torch", "attention/fastln"),
    *("lora/peft", "lora/fastln", "ia3/peft", "layernorm+lora/fastln"),
]


@pytest.mark.parametrize("pair", ENGINES)
def test_every_engine_trains_it(pair, bert, caplog):
    method, engine = pair.split("/")
    torch.manual_seed(0)
    stock = bert()
    start = stock.classifier.weight.detach().clone()
    with caplog.at_level(logging.INFO, "fastln"):
        model = put_method(stock, method, engine)
    assert caplog.text.count("because the checkpoint lacks it: classifier") == 1
    parameters = [p for p in model.parameters() if p.requires_grad]
    batch = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.tensor([0, 1])}
    model.train()(**batch).loss.backward()
    torch.optim.SGD(parameters, lr=0.1).step()
    assert not torch.equal(to_stock(model).classifier.weight, start)
    frozen = put_method(bert(), method, engine, without="random_heads")
    assert not [name for name in trained(frozen) if "classifier" in name and name.endswith("weight")]


def test_what_else_is_random_and_frozen_is_named(folder, caplog):
    with caplog.at_level(logging.WARNING, "fastln"):
        fastln.prepare(BertModel.from_pretrained(checkpoints.write(folder, "bert without pooler")))
        model = LlamaForCausalLM.from_pretrained(checkpoints.write(folder, "llama without head"))
        put_method(model, "prompt")
    assert "not in the checkpoint of BertModel, so random, and frozen: pooler; load a checkpoint" in caplog.text
    assert "so random, and frozen: lm_head; method 'prompt' trains only its virtual tokens" in caplog.text


class Pictures(Dataset):
    """Dark and bright pictures: of two classes."""

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        label = index % 2
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator) + 2 * label - 1, "labels": label}

    def __len__(self):
        return 32


@pytest.mark.parametrize("method", ["layernorm", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_trainer_without_also_learns(method, vit, tmp_path):
    """The loss of the last batch tells the two apart; with the head frozen and random, it stays well above."""
    losses = {}
    for without in ((), "random_heads"):
        torch.manual_seed(0)
        model = vit()
        start = model.classifier.weight.detach().clone()
        args = arguments(tmp_path, save_strategy="no", max_steps=12, per_device_train_batch_size=8)
        trainer = FastLNTrainer(model, args, train_dataset=Pictures(), method=method, without=without)
        trainer.train()
        losses[without] = [row["loss"] for row in trainer.state.log_history if "loss" in row][-1]
        head = to_stock(trainer.model).classifier.weight
        assert torch.equal(head, start) == (without != ())
    assert losses[()] < 0.5 * losses["random_heads"]


@pytest.mark.parametrize("method", ["layernorm", "lora"])
def test_the_adapter_holds_it(method, bert, tmp_path):
    model = put_method(bert(), method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    save_trained_adapter(model, tmp_path / "adapter")
    wanted = to_stock(model).eval()
    loaded = load_trained_adapter(bert(), tmp_path / "adapter").eval()
    ids = torch.arange(6)[None]
    torch.testing.assert_close(loaded(ids).logits, wanted(ids).logits)


def test_an_adapter_in_a_prepared_model_goes_on_or_says_what_does_not(bert, folder, tmp_path, caplog):
    model = fastln.prepare(bert(), also=["bert.pooler"])
    model.classifier.weight.data.add_(0.5)
    fastln.save_adapter(model, tmp_path / "adapter")
    again = fastln.prepare(bert())
    with caplog.at_level(logging.WARNING, "fastln"):
        fastln.load_adapter(again, tmp_path / "adapter")
    assert trained(again) >= HEAD
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    assert "bert.pooler.dense got the adapter's values but stay frozen, and save_adapter would leave" in caplog.text
    caplog.clear()
    fastln.load_adapter(fastln.prepare(bert(), also=["bert.pooler"]), tmp_path / "adapter")
    fastln.load_adapter(bert(), tmp_path / "adapter")
    assert "frozen" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_in_16_bits_trains_by_float32_copies_or_with_a_warning(dtype, bert, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "fastln"):
        fastln.prepare(bert(dtype=dtype))
    harm = "turns them NaN" if dtype == torch.float16 else "loses small steps"
    name = str(dtype).removeprefix("torch.")
    assert f"2 parameters train in {name}, for example classifier.weight, and plain AdamW {harm}" in caplog.text
    caplog.clear()
    args = arguments(tmp_path, learning_rate=1e-4)
    with caplog.at_level(logging.INFO, trainer_logger.name):
        trainer = FastLNTrainer(bert(dtype=dtype), args)
        assert isinstance(trainer.create_optimizer(), MasterAdamW)
    assert "plain AdamW" not in caplog.text
    assert f"parameters train in {name}: AdamW keeps float32 copies of them" in caplog.text
    trainer = FastLNTrainer(bert(dtype=dtype), args, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1e-3}))
    trainer.create_optimizer()
    assert f"parameters train in {name}, and SGD keeps no float32 copies of them" in caplog.text


def test_a_float16_head_stays_finite_in_the_trainer(bert, tmp_path):
    class Sentences(Dataset):
        def __getitem__(self, index):
            return {"input_ids": torch.arange(8) + index % 2 * 20, "labels": index % 2}

        def __len__(self):
            return 16

    model = bert(dtype=torch.float16)
    start = model.classifier.weight.detach().clone()
    FastLNTrainer(model, arguments(tmp_path, save_strategy="no", max_steps=4), train_dataset=Sentences()).train()
    assert model.classifier.weight.isfinite().all()
    assert not torch.equal(model.classifier.weight, start)


@pytest.mark.parametrize("method", ["layernorm", "lora"])
def test_a_run_resumes_on_a_model_whose_new_head_was_drawn_anew(method, vit, tmp_path, caplog):
    def trainer(steps):
        args = arguments(tmp_path, save_steps=2, max_steps=steps)
        return FastLNTrainer(vit(), args, train_dataset=Pictures(), method=method)

    trainer(2).train()
    drawn = trainer(4)
    with caplog.at_level(logging.INFO, "fastln"):
        drawn.train(resume_from_checkpoint=True)
    assert f"continuing from {tmp_path / 'checkpoint-2'}" in caplog.text
    assert drawn.state.global_step == 4

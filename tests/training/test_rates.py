"""Learning rates: what is asked is what every group uses, nothing is asked in vain, and the record says it."""

import dataclasses
import json
import logging

import pytest
import tiny
import torch
from small_run import Sentences, arguments, llama

from fastln import FastLNError, FastLNTrainer
from fastln.methods import HEAD_LEARNING_RATE, METHODS, norm_parameters
from fastln.training import TrainConfig, build_optimizer, train_task
from fastln.training.optimizer import rates_in_use
from fastln.training.tasks import apply_method, groups_that_train
from fastln.training.train import check_settings

MIXED = ["layernorm", "layernorm+bias", "layernorm-full", "layernorm+lora", "lora", "head", "LN-T", "F-LN"]
OTHERS = [m for m in (*METHODS, "LN-LN", "ATT-FFN", "T-F") if m not in (*MIXED, "prefix", "p-tuning", "prompt")]


@pytest.fixture(scope="module")
def dual(tmp_path_factory):
    folder, data = tmp_path_factory.mktemp("dual"), tiny.phantom(8)
    return lambda: tiny.dual(folder, data)


def rates(task, config):
    """The rates that the optimizer has, and those that are said beforehand."""
    model = apply_method(task, config.method)
    optimizer = build_optimizer(model, task, config)
    said = rates_in_use(model, task.head_under(config.method), config.rates)
    return {group["lr"] for group in optimizer.param_groups}, said


@pytest.mark.parametrize("method", [*MIXED, *(pytest.param(method, marks=pytest.mark.slow) for method in OTHERS)])
def test_the_rate_that_is_asked_is_that_of_all(method, dual):
    task = dual()
    predicted = groups_that_train(task, method)
    used, said = rates(task, TrainConfig(method, learning_rate=1e-7))
    assert used == {1e-7}
    assert said == dict.fromkeys(said, 1e-7)
    assert said.keys() == predicted
    if method == "head":
        return
    used, said = rates(dual(), TrainConfig(method, learning_rate=1e-7, head_learning_rate=1e-2))
    assert used == {1e-7, 1e-2}
    if "norms" in predicted:
        own = {"norm_learning_rate": 1e-4, "head_learning_rate": 1e-2}
        used, said = rates(dual(), TrainConfig(method, learning_rate=1e-7 if "own" in predicted else None, **own))
        assert used == set(said.values()) == {1e-4, 1e-2} | ({1e-7} if "own" in predicted else set())
        assert said["norms"] == 1e-4


@pytest.mark.parametrize("method", ["layernorm", "layernorm+bias", "LN-T", "lora", "head"])
def test_by_default_each_group_has_the_method_s(method, dual):
    _, said = rates(dual(), TrainConfig(method))
    norms, others = METHODS["layernorm"].learning_rate, {"layernorm+bias": 1e-3, "LN-T": 5e-5, "lora": 5e-4}
    wanted = {"norms": norms, "own": others.get(method), "head": HEAD_LEARNING_RATE}
    assert said == {group: wanted[group] for group in said}
    assert "norms" in said or method in ("lora", "head")


@pytest.mark.parametrize(
    ("method", "given", "wrong"),
    [
        (
            "lora",
            {"norm_learning_rate": 1e-3},
            "norm_learning_rate is for norms, and method 'lora' trains none in dual",
        ),
        ("head", {"norm_learning_rate": 1e-3}, "norm_learning_rate is for norms, and method 'head' trains none"),
        ("F-ATT", {"norm_learning_rate": 1e-3}, "method 'F-ATT' trains none"),
        ("head", {"head_learning_rate": 1e-3}, "method 'head' trains the head at learning_rate"),
        (
            "layernorm",
            {"learning_rate": 1e-3, "norm_learning_rate": 1e-3, "head_learning_rate": 1e-3},
            "learning_rate has no effect: all that method 'layernorm' trains in dual:vision,text has a rate of its own",
        ),
    ],
)
def test_a_rate_that_nothing_uses_is_refused(method, given, wrong, dual):
    with pytest.raises(FastLNError, match=wrong):
        check_settings(dual(), TrainConfig(method, **given))


def test_on_a_model_without_a_random_head(tmp_path):
    task = tiny.blip(tmp_path, tiny.phantom(4))
    with pytest.raises(FastLNError, match="learning_rate has no effect: all that method 'layernorm' trains"):
        check_settings(task, TrainConfig(learning_rate=1e-3, norm_learning_rate=1e-3))
    with pytest.raises(FastLNError, match="head_learning_rate is for a task head that starts random"):
        check_settings(task, TrainConfig(head_learning_rate=1e-3))
    check_settings(task, TrainConfig("full", learning_rate=1e-3, norm_learning_rate=1e-3))
    check_settings(task, TrainConfig("head", learning_rate=1e-3))  # `apply_method` says that there is no head
    with pytest.raises(FastLNError, match="norm_learning_rate is 0; it must be greater"):
        TrainConfig(norm_learning_rate=0)


def test_a_run_moves_norms_and_head_by_the_rate_that_is_asked_and_logs_it(dual, caplog):
    """Adam's first step moves every weight by its rate, so the largest movement shows the rate that was used."""
    task = dual()
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    config = TrainConfig(
        "LN-T", epochs=1, head_epochs=0, batch_size=8, learning_rate=1e-7, warmup=0.0, weight_decay=0.0
    )
    with caplog.at_level(logging.INFO, "fastln"):
        train_task(task, tiny.phantom(8), config, progress=False)
    moved = {name: (p - before[name]).abs().max().item() for name, p in task.model.named_parameters()}
    assert 0 < max(moved.values()) < 2.5e-7  # half a rounding of a γ of 1 on top
    assert "learning rates at their highest: norms 1e-07, the method's others 1e-07, task head 1e-07" in caplog.text


def test_the_record_has_the_rates_that_were_used(phantom, tmp_path, command):
    tiny.towers(tmp_path, tiny.phantom(12).samples)
    model = f"dual:{tmp_path / 'vision'},{tmp_path / 'text'}"
    words = ("train", "--data", phantom, "--model", model, "--epochs", 1, "--head-epochs", 0, "--method", "LN-F")
    command(*words, "--norm-learning-rate", 2e-3, "learning_rate=1e-7", "--out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["learning_rates"] == {"norms": 2e-3, "head": 1e-7}
    assert record["run"]["config"]["norm_learning_rate"] == 2e-3
    (tmp_path / "run.yaml").write_text("norm_learning_rate: 0.004\nmethod: lora\n")
    command(*words[:-2], "--config", tmp_path / "run.yaml", "--out", tmp_path / "other", status=2)


def test_print_config_shows_what_each_group_uses(command, capsys):
    command("train", "--print-config", "--method", "LN-T", "--learning-rate", 1e-7, "--head-learning-rate", 0.5)
    printed = capsys.readouterr().out
    assert "learning_rate: 1.0e-07\nnorm_learning_rate: null  # 1e-07\nhead_learning_rate: 0.5\n" in printed
    command("train", "--print-config", "--method", "LN-T")
    printed = capsys.readouterr().out
    assert (
        "learning_rate: null  # 5e-05\nnorm_learning_rate: null  # 0.003\nhead_learning_rate: null  # 0.001\n"
        in printed
    )


def test_every_rate_of_a_run_is_one_of_its_settings():
    """A rate that is added needs its place in `check_settings` and in the tests above."""
    names = {field.name for field in dataclasses.fields(TrainConfig) if field.name.endswith("learning_rate")}
    assert names == {"learning_rate", "norm_learning_rate", "head_learning_rate"}


class Own(FastLNTrainer):
    """Makes an optimizer of its own: without a rate for norms, or with one."""

    knows = False

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            rate = self.norm_learning_rate if self.knows else self.args.learning_rate
            self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=rate)
        return self.optimizer


class Knows(Own):
    knows = True


class After(FastLNTrainer):
    """Replaces the optimizer that FastLNTrainer made."""

    def create_optimizer(self, model=None):
        super().create_optimizer(model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        return self.optimizer


@pytest.mark.parametrize("cls", [Own, After])
def test_an_optimizer_of_a_subclass_that_ignores_the_rate_of_norms_is_refused(cls, tmp_path):
    trainer = cls(llama(), arguments(tmp_path, save_strategy="no"), None, Sentences(), norm_learning_rate=0.5)
    with pytest.raises(FastLNError, match="norm_learning_rate has no effect on an optimizer that FastLNTrainer"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("cls", [Knows, FastLNTrainer])
def test_one_that_uses_it_is_not(cls, tmp_path):
    args = arguments(tmp_path, save_strategy="no", max_steps=1)
    trainer = cls(llama(), args, None, Sentences(), norm_learning_rate=0.5)
    trainer.train()
    trainer.train()  # the optimizer stays
    assert trainer.state.global_step == 1


def test_an_optimizer_of_deepspeed_s_configuration_is_refused(tmp_path):
    """Such an optimizer stands in for one that DeepSpeed makes; no group tells which parameters are norms."""
    trainer = FastLNTrainer(llama(), arguments(tmp_path), None, Sentences(), norm_learning_rate=0.5)
    trainer.optimizer = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=1e-3)
    with pytest.raises(FastLNError, match="leave the optimizer out of DeepSpeed's configuration"):
        trainer._check_norm_rate()


def test_norms_in_bfloat16_move_by_float32_copies(tmp_path):
    """At a rate that bfloat16 rounds away, three steps do not show in the norms, but in their copies."""
    model = llama().to(torch.bfloat16)
    args = arguments(tmp_path, save_strategy="no", learning_rate=2e-4, lr_scheduler_type="constant", max_steps=20)
    trainer = FastLNTrainer(model, args, None, Sentences(), engine="torch")
    trainer.train()
    norms = [p for name, p in trainer.model.named_parameters() if name in norm_parameters(trainer.model)]
    assert any((p != 1).any() for p in norms if p.requires_grad)

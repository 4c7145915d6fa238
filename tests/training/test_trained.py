"""What a checkpoint holds: all that training changed, in a form that everything which reads adapters reads."""

import logging
import os

import peft
import pytest
import torch
from resuming import Stop, same, state, straight_and_resumed
from safetensors.torch import load_file
from small_run import Sentences, arguments, llama
from torch import nn
from torch.utils.data import Dataset
from transformers import CvtConfig, CvtForImageClassification, Trainer, TrainerCallback

import fastln
from fastln import FastLNTrainer
from fastln.adapters import TRAINED, WEIGHTS
from fastln.changes import EXTRA
from fastln.state import prepared
from fastln.training import checkpoints

CVT = {
    "embed_dim": [8, 8, 16],
    "num_heads": [1, 1, 2],
    "depth": [1, 2, 3],
    "mlp_ratio": [2.0, 2.0, 2.0],
    "drop_path_rate": [0.0, 0.0, 0.0],
}


class Images(Dataset):
    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": 3 + torch.randn(3, 32, 32, generator=generator), "labels": torch.tensor(index % 2)}

    def __len__(self):
        return 16


def cvt(folder):
    """A CvT, whose attention has batch norms, loaded from a folder."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        CvtForImageClassification(CvtConfig(**CVT)).save_pretrained(folder)
    return CvtForImageClassification.from_pretrained(folder)


@pytest.mark.parametrize("engine", ["fastln", "peft"])
def test_batch_norms_statistics_resume_and_come_with_the_adapter(engine, tmp_path):
    base = tmp_path / "base"

    def run(out, steps, **settings):
        args = arguments(out, max_steps=steps, save_total_limit=None, **settings)
        return FastLNTrainer(cvt(base), args, train_dataset=Images(), eval_dataset=Images(), engine=engine)

    straight = run(tmp_path / "a", 4)
    straight.train()
    stopped = run(tmp_path / "b", 4)
    stopped.add_callback(Stop(2))
    stopped.train()
    resumed = run(tmp_path / "b", 4)
    resumed.train(resume_from_checkpoint=True)
    final = state(straight.model)
    start = state(cvt(base))
    moved = [name for name in start if name.endswith("running_mean")]
    prefix = "base_model.model." if engine == "peft" else ""
    assert moved
    assert not any(torch.equal(start[name], final[prefix + name]) for name in moved)
    assert same(resumed.model, final)
    checkpoint = tmp_path / "a" / "checkpoint-4"
    assert not (checkpoint / TRAINED).exists(), "the adapter holds everything"
    assert not any("position" in name for name in load_file(checkpoint / WEIGHTS)), "constants stay with the base"
    wrapped = peft.PeftModel.from_pretrained(cvt(base), checkpoint).base_model.model
    assert all(torch.equal(wrapped.get_buffer(name), final[prefix + name]) for name in moved)
    if engine == "fastln":
        loaded = cvt(base)
        fastln.load_adapter(loaded, checkpoint)
        assert same(loaded, final)
        fastln.save_adapter(fastln.prepare(loaded, backend="reference"), tmp_path / "again")
        again = cvt(base)
        fastln.load_adapter(again, tmp_path / "again")
        assert same(again, final), "an adapter saved again keeps what the first had"


def test_the_best_models_statistics_come_back(tmp_path):
    args = arguments(
        tmp_path / "out",
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        learning_rate=0.5,
        save_total_limit=1,
    )
    trainer = FastLNTrainer(cvt(tmp_path / "base"), args, train_dataset=Images(), eval_dataset=Images())
    kept = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            kept[state.global_step] = globals()["state"](model)

    trainer.add_callback(Keep())
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 6
    assert trainer.state.best_model_checkpoint == os.path.join(args.output_dir, f"checkpoint-{best}")
    assert same(trainer.model, kept[best])
    assert not same(trainer.model, kept[6])
    # As stock, which deletes the last one at the end, because one may stay.
    assert [path.name for path in checkpoints.checkpoints_in(tmp_path / "out")] == [f"checkpoint-{best}"]


class Restless(nn.Module):
    """A norm among all kinds of state that training changes and no optimizer has."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 2)
        self.teacher = nn.Linear(8, 2).requires_grad_(False)  # a moving average
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("range", torch.zeros(2))
        self.register_buffer("constant", torch.arange(400_000.0))
        self.register_buffer("scratch", torch.zeros(()), persistent=False)
        self.seen = 0

    def forward(self, x, labels=None):
        logits = self.out(self.norm(x)) + self.teacher(x) + 0.01 * self.count + self.range.sum() + 0.01 * self.seen
        if self.training:
            self.count += 1
            self.range.copy_(torch.stack([x.min(), x.max()]))
            self.teacher.weight.data.mul_(0.9)
            self.seen += 1
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    def get_extra_state(self):
        return {"seen": self.seen}

    def set_extra_state(self, state):
        self.seen = state["seen"]


class Points(Dataset):
    def __getitem__(self, index):
        return {"x": torch.randn(8, generator=torch.Generator().manual_seed(index)), "labels": torch.tensor(index % 2)}

    def __len__(self):
        return 16


def test_counters_averages_ranges_and_extra_states_resume(tmp_path):
    def run(folder):
        torch.manual_seed(0)
        args = arguments(folder, max_steps=4, save_total_limit=None)
        return FastLNTrainer(Restless(), args, train_dataset=Points(), also="out")

    straight, resumed = straight_and_resumed(run, tmp_path)
    checkpoint = tmp_path / "a" / "checkpoint-4"
    assert resumed.model.seen == straight.model.seen == 4
    assert all(torch.equal(p, q) for p, q in zip(resumed.model.parameters(), straight.model.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(resumed.model.buffers(), straight.model.buffers(), strict=True))
    assert set(load_file(checkpoint / TRAINED)) == {"teacher.weight"}, "the adapter has the others"
    assert sum(path.stat().st_size for path in (checkpoint / WEIGHTS, checkpoint / TRAINED)) < 4000
    assert (checkpoint / EXTRA).is_file()
    torch.manual_seed(0)
    loaded = Restless()
    fastln.load_adapter(loaded, checkpoint)
    x = Points()[3]["x"][None]
    with torch.no_grad():
        logits = [model.eval()(x, torch.tensor([0]))["logits"] for model in (loaded, fastln.restore(straight.model))]
    assert torch.equal(*logits)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("dora", "ia3", "vera", "p-tuning")]


@pytest.mark.slow(take=1)
@pytest.mark.parametrize("method", ["lora", "adalora", "layernorm+lora", *SLOW])
def test_every_method_of_pefts_resumes_to_the_same_bits(method, tmp_path):
    def run(folder):
        args = arguments(folder, max_steps=4, save_total_limit=None)
        return FastLNTrainer(llama(), args, train_dataset=Sentences(), method=method)

    straight, resumed = straight_and_resumed(run, tmp_path)
    assert same(resumed.model, state(straight.model))
    checkpoint = tmp_path / "a" / "checkpoint-4"
    assert (checkpoint / WEIGHTS).exists() == (method != "layernorm+lora")
    if method in ("lora", "ia3"):
        assert not (checkpoint / TRAINED).exists(), "no value is there twice"


def test_without_optimizer_and_schedule_the_rate_goes_on_and_what_is_missing_is_told(tmp_path, caplog):
    def run(folder, **settings):
        args = arguments(folder, max_steps=6, lr_scheduler_type="cosine", warmup_steps=2, **settings)
        return FastLNTrainer(llama(), args, train_dataset=Sentences())

    def rates(trainer):
        return {row["step"]: row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row}

    straight = run(tmp_path / "a")
    straight.train()
    stopped = run(tmp_path / "b", save_only_model=True)
    stopped.add_callback(Stop(4))
    stopped.train()
    resumed = run(tmp_path / "b", save_only_model=True)
    with caplog.at_level(logging.WARNING, "fastln"):
        resumed.train(resume_from_checkpoint=True)
    (told,) = [message for message in caplog.messages if "as with save_only_model" in message]
    assert "checkpoint-4 has no optimizer.pt, scheduler.pt, rng_state.pth" in told
    assert "the optimizer's averages start at 0" in told
    assert rates(resumed) == pytest.approx(rates(straight))


def test_a_schedule_that_cannot_be_taken_up_is_told(tmp_path, caplog):
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
    for _ in range(2):
        args = arguments(tmp_path, max_steps=4, save_only_model=True, metric_for_best_model="loss", **settings)
        trainer = FastLNTrainer(llama(), args, train_dataset=Sentences(), eval_dataset=Sentences())
        resume = bool(checkpoints.checkpoints_in(tmp_path))
        if not resume:
            trainer.add_callback(Stop(2))
        trainer.train(resume_from_checkpoint=resume)
    assert any("ReduceLROnPlateau cannot take up its schedule" in message for message in caplog.messages)


class Seen(TrainerCallback):
    def __init__(self):
        self.at = {}

    def _see(self, event, model, optimizer, scheduler):
        self.at[event] = (model, optimizer, scheduler, prepared(model) is not None)

    def on_init_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self._see("init", model, optimizer, lr_scheduler)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self._see("train", model, optimizer, lr_scheduler)


@pytest.mark.parametrize("method", ["layernorm", "lora"])
@pytest.mark.parametrize("by", ["model", "model_init"])
def test_callbacks_see_the_model_that_trains_from_the_start(method, by, tmp_path):
    seen = Seen()
    model = {"model": llama()} if by == "model" else {"model_init": lambda: llama()}
    args = arguments(tmp_path, max_steps=1)
    trainer = FastLNTrainer(**model, args=args, train_dataset=Sentences(), callbacks=[seen], method=method)
    stock = Trainer(llama(), args, train_dataset=Sentences(), callbacks=[Seen()])
    kinds = [[type(c) for c in t.callback_handler.callbacks] for t in (trainer, stock)]
    assert kinds[0] == kinds[1]
    at_init, *_, was_prepared = seen.at["init"]
    assert at_init is trainer.model is trainer.callback_handler.model
    assert was_prepared == (method == "layernorm")
    trainer.train()
    at_start, optimizer, scheduler, _ = seen.at["train"]
    assert at_start is trainer.model
    assert optimizer is trainer.optimizer is not None
    assert scheduler is trainer.lr_scheduler is not None

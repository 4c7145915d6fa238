"""What a checkpoint holds: all that training changed, in a form that everything which reads adapters reads."""

import json
import logging
import os
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import Sentences, arguments, llama
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, CvtConfig, CvtForImageClassification, Trainer, TrainerCallback

import fastln
from fastln import FastLNError, FastLNTrainer
from fastln.adapters import TRAINED, WEIGHTS, WHOLE
from fastln.changes import EXTRA
from fastln.fingerprint import FINGERPRINT, fingerprint
from fastln.models.tokens import word_tokenizer
from fastln.state import prepared
from fastln.training import checkpoints
from fastln.training.tasks import load_values
from fastln.training.trained import load_trained, trained_parameters

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


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(model, expected):
    return all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


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


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


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


def straight_and_resumed(run, folder):
    """Train without a stop in FOLDER/a, and with a stop and a resumption in FOLDER/b; return both trainers."""
    straight = run(folder / "a")
    straight.train()
    stopped = run(folder / "b")
    stopped.add_callback(Stop(2))
    stopped.train()
    resumed = run(folder / "b")
    resumed.train(resume_from_checkpoint=True)
    return straight, resumed


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


def test_a_checkpoint_says_its_base_and_transformers_and_peft_load_it(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("base")
    words = word_tokenizer(["one two"], 60)
    trainer = FastLNTrainer(model, arguments("out", max_steps=2), train_dataset=Sentences(), processing_class=words)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    assert {path.name for path in checkpoint.iterdir()} >= {"tokenizer.json", "training_args.bin"}
    batch = {name: tensor[None] for name, tensor in Sentences()[1].items() if name != "id"}
    expected = fastln.restore(trainer.model).eval()(**batch).loss
    monkeypatch.chdir("/")
    for loaded in (
        AutoModelForCausalLM.from_pretrained(checkpoint),
        peft.AutoPeftModelForCausalLM.from_pretrained(checkpoint),
    ):
        assert torch.equal(loaded.eval()(**batch).loss, expected)


def test_if_everything_trains_a_checkpoint_is_what_stock_writes(tmp_path):
    for cls, extra in ((FastLNTrainer, {"method": "full"}), (Trainer, {})):
        trainer = cls(llama(), arguments(tmp_path / cls.__name__, max_steps=2), train_dataset=Sentences(), **extra)
        trainer.train()
    ours, stock = (
        {p.name for p in (tmp_path / name / "checkpoint-2").iterdir()} for name in ("FastLNTrainer", "Trainer")
    )
    assert ours - stock == {"files.json", "fastln.json"}
    assert stock <= ours
    loaded, by_stock = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "checkpoint-2") for name in ("FastLNTrainer", "Trainer")
    )
    for name, tensor in by_stock.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    again = FastLNTrainer(llama(), arguments(tmp_path / "FastLNTrainer"), train_dataset=Sentences(), method="full")
    load_trained(again.model, tmp_path / "FastLNTrainer" / "checkpoint-2")
    assert same(again.model, state(loaded))
    onto = llama()
    fastln.load_adapter(onto, tmp_path / "FastLNTrainer" / "checkpoint-2")
    assert same(onto, state(loaded))


@pytest.mark.parametrize("method", ["bitfit", "attention"])
def test_what_no_adapter_holds_loads_by_its_plain_names_and_other_loaders_say_so(method, tmp_path):
    def base():
        return llama(attention_bias=True)

    base().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = FastLNTrainer(model, arguments(tmp_path / "out", max_steps=2), train_dataset=Sentences(), method=method)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert set(load_file(checkpoint / TRAINED)) == set(trained_parameters(trainer.model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fastln.load_adapter(loaded, checkpoint)
    assert same(loaded, state(trainer.model))
    for load in (
        AutoModelForCausalLM.from_pretrained,
        lambda folder: peft.PeftModel.from_pretrained(base(), folder),
    ):
        with pytest.raises(Exception, match=re.escape("call fastln.load_adapter(base, folder)")):
            load(checkpoint)


@pytest.mark.parametrize("method", ["lora/peft", "lora/fastln", "layernorm+lora/fastln"])
def test_a_new_head_beside_lora_resumes_on_a_base_with_other_random_values(method, tmp_path, caplog):
    llama().model.save_pretrained(tmp_path / "base")
    method, engine = method.split("/")
    settings = {"method": method, "engine": engine, "train_dataset": Sentences()}

    def run():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        return FastLNTrainer(model, arguments(tmp_path, max_steps=4), **settings)

    stopped = run()
    stopped.add_callback(Stop(2))
    stopped.train()
    trained = state(stopped.model)
    torch.manual_seed(5)
    resumed = run()
    load_trained(resumed.model, tmp_path / "checkpoint-2")
    names = trained_parameters(resumed.model)
    assert any("lm_head" in name for name in names)
    assert all(torch.equal(parameter, trained[name]) for name, parameter in names.items())
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        want = resumed.model.eval()(input_ids=ids).logits
        caplog.clear()
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        got = load_values(base, tmp_path / "checkpoint-2").eval()(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert "has no effect" not in caplog.text


def test_save_model_leaves_no_norm_out_beside_lora(tmp_path):
    trainer = FastLNTrainer(llama(), arguments(tmp_path), train_dataset=Sentences(), method="layernorm+lora")
    with torch.no_grad():
        for parameter in trained_parameters(trainer.model).values():
            parameter.add_(0.1)
    trainer.save_model(str(tmp_path / "model"))
    again = FastLNTrainer(llama(), arguments(tmp_path), train_dataset=Sentences(), method="layernorm+lora")
    load_trained(again.model, tmp_path / "model")
    assert same(again.model, state(trainer.model))


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


@pytest.mark.parametrize("also", [(), ("model.embed_tokens", "lm_head")])
def test_a_resized_vocabulary_is_told_with_what_to_do(also, tmp_path):
    def run(n_tokens=None):
        model = llama()
        if n_tokens is not None:
            model.resize_token_embeddings(n_tokens)
        return FastLNTrainer(model, arguments(tmp_path / "out", max_steps=2), train_dataset=Sentences(), also=also)

    run(72).train()
    advice = r"its vocabulary has 72 tokens there and 64 here; call model\.resize_token_embeddings\(72\) first"
    with pytest.raises(FastLNError, match=advice):
        run().train(resume_from_checkpoint=True)
    with pytest.raises(FastLNError, match=advice):
        fastln.load_adapter(llama(), tmp_path / "out" / "checkpoint-2")


def test_a_checkpoint_of_an_earlier_version_loads_and_refuses_another_base(tmp_path):
    model = fastln.prepare(llama(), backend="reference")
    norms = {name: p.detach() + 1 for name, p in trained_parameters(model).items()}
    save_file(norms, tmp_path / TRAINED, {FINGERPRINT: fingerprint(model, norms)})
    load_trained(model, tmp_path)
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in norms.items())
    with torch.no_grad():
        model.lm_head.weight += 1
    with pytest.raises(FastLNError, match="it is from another base model: 1 of"):
        load_trained(model, tmp_path)


def test_norms_beside_lora_are_no_adapter_of_a_stock_model(tmp_path):
    args = arguments(tmp_path, max_steps=2)
    FastLNTrainer(llama(), args, train_dataset=Sentences(), method="layernorm+lora").train()
    with pytest.raises(FastLNError, match=r"holds LoRA layers beside norms.*fastln eval and fastln merge read it"):
        fastln.load_adapter(llama(), tmp_path / "checkpoint-2")


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


def test_save_model_writes_what_stock_writes_also_for_the_hub(tmp_path):
    def files(cls, **settings):
        trainer = cls(llama().bfloat16(), arguments(tmp_path / "out"), train_dataset=Sentences(), **settings)
        for name in ("model", "hub"):
            trainer.save_model(str(tmp_path / cls.__name__ / name), _internal_call=name == "hub")
        trainer.save_state()
        return [{p.name for p in (tmp_path / cls.__name__ / name).iterdir()} for name in ("model", "hub")]

    ours = files(FastLNTrainer)
    assert ours == files(Trainer)
    stored = load_file(tmp_path / "FastLNTrainer" / "hub" / WHOLE)
    assert stored["model.norm.weight"].dtype == torch.float32, "every digit of the norms"
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "FastLNTrainer" / "hub")
    assert again.dtype == torch.bfloat16
    assert (tmp_path / "out" / "trainer_state.json").is_file()

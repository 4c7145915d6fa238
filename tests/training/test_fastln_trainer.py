"""FastLNTrainer: what it adds to the Trainer, what of the Trainer keeps working, and what stops it."""

import pytest
import torch
from small_run import Sentences, arguments, llama
from torch.utils.data import Subset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

import fastln
from fastln import FastLNError, FastLNTrainer
from fastln.methods import norm_parameters
from fastln.settings import MethodSettings
from fastln.training import fastln_trainer
from fastln.training.progress import check_loss, why_not_a_number
from fastln.training.sample_ids import WithSampleIds


def train(folder, model=None, data=None, resume=None, **settings):
    own = {key: settings.pop(key) for key in ("method", "scope", "engine", "norm_learning_rate") if key in settings}
    trainer = FastLNTrainer(model or llama(), arguments(folder, **settings), train_dataset=data or Sentences(), **own)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_an_optimizer_of_other_groups_is_refused_in_a_sentence(tmp_path):
    train(tmp_path, save_steps=1, max_steps=1, norm_learning_rate=1e-3)
    with pytest.raises(FastLNError, match=r"checkpoint-1: its optimizer does not fit this .* norm_learning_rate"):
        train(tmp_path, save_steps=1, max_steps=2, resume=True)


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def moved(trainer, model):
    before = dict(model.named_parameters())
    return {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}


def test_one_line_changes(tmp_path, capsys):
    losses = {}
    for cls in (Trainer, FastLNTrainer):
        # The same positional arguments as the Trainer's.
        trainer = cls(llama(), arguments(tmp_path, save_strategy="no", max_steps=4), None, Sentences())
        trainer.train()
        losses[cls] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert moved(trainer, llama()) == set(norm_parameters(llama()))
    # Until the first step both are the same model.
    assert losses[FastLNTrainer][0] == pytest.approx(losses[Trainer][0], rel=1e-5)
    assert "layernorm: 160 of 24,736 parameters train (0.6468%)" in capsys.readouterr().out


def test_the_log_shows_movement_throughput_and_memory(tmp_path):
    trainer = train(tmp_path, save_strategy="no")
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 12
    shifts = [row["gamma_shift"] for row in rows]
    start = {name: p for name, p in llama().named_parameters() if name in norm_parameters(llama())}
    changes = [(p - start[name]).abs() for name, p in weights(trainer).items() if name in start]
    assert shifts[-1] == pytest.approx(torch.cat(changes).mean().item(), rel=1e-5)
    assert shifts[0] > 0
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(12 * row["samples_per_second"], rel=1e-2)
        assert row["peak_memory_mib"] > 10


def test_norms_are_float32_with_their_own_rate_and_nothing_small_decays(tmp_path):
    model = llama(attention_bias=True).to(torch.bfloat16)
    args = arguments(tmp_path, weight_decay=0.1)
    trainer = FastLNTrainer(model, args, train_dataset=Sentences(), method="full", norm_learning_rate=0.5)
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    norms = set(norm_parameters(model))
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            assert parameter.dtype == (torch.float32 if name in norms else torch.bfloat16)
            assert group["lr"] == (0.5 if name in norms else 1e-2)
            assert group["weight_decay"] == (0.1 if parameter.dim() == 2 else 0.0)
    assert seen == set(names.values())
    with pytest.raises(FastLNError, match="norm_learning_rate is 0; it must be greater"):
        FastLNTrainer(llama(), args, norm_learning_rate=0)


def test_a_norm_learning_rate_without_effect_is_an_error(tmp_path):
    args = arguments(tmp_path)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(FastLNError, match="norm_learning_rate has no effect on an optimizer of your own: give"):
        FastLNTrainer(model, args, optimizers=(optimizer, None), norm_learning_rate=0.5)
    fastln.prepare(model)  # nothing was put on it
    with pytest.raises(FastLNError, match="method 'lora' trains no norm here; leave norm_learning_rate out"):
        FastLNTrainer(llama(), args, method="lora", norm_learning_rate=0.5)
    model = llama()
    elsewhere = (torch.optim.SGD, {"params": [model.lm_head.weight], "lr": 0.1})
    trainer = FastLNTrainer(
        model, args, train_dataset=Sentences(), optimizer_cls_and_kwargs=elsewhere, norm_learning_rate=0.5
    )
    with pytest.raises(FastLNError, match="no effect on SGD, whose parameter groups hold no norm"):
        trainer.train()


def test_the_method_s_settings_are_passed_on_whole(tmp_path, monkeypatch):
    given = []

    def put(model, settings):
        given.append(settings)
        return model

    monkeypatch.setattr(fastln_trainer, "put_again", put)
    own = {"scope": "text", "also": "lm_head", "backend": "reference", "without": ("attention",), "products": "int8"}
    FastLNTrainer(llama(), arguments(tmp_path))
    FastLNTrainer(llama(), arguments(tmp_path), method="bitfit", engine="fastln", keep_weights=True, **own)
    kept = {"method": "bitfit", "engine": "fastln", "keep_weights": True}
    assert given == [MethodSettings.of(), MethodSettings.of(**own, **kept)]


@pytest.mark.slow(take=1)
@pytest.mark.parametrize("method", ["lora", "layernorm+lora", "adalora", "prompt", "LN"])
def test_resumed_it_goes_on_bit_for_bit(method, tmp_path):
    straight = train(tmp_path / "a", method=method, save_steps=6)
    train(tmp_path / "b", method=method, save_steps=6)
    (tmp_path / "b" / "checkpoint-12").rename(tmp_path / "away")
    resumed = train(tmp_path / "b", method=method, save_steps=6, resume=True)
    assert resumed.state.global_step == 12
    for name, tensor in weights(straight).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    # The shift of γ is told from the model as it was given, not from the checkpoint.
    for one, other in zip(straight.state.log_history[:12], resumed.state.log_history[:12], strict=True):
        assert one.get("gamma_shift") == other.get("gamma_shift")


def test_adalora_is_told_its_steps_and_loses_ranks(tmp_path):
    trainer = train(tmp_path, method="adalora", save_strategy="no")
    tuner = trainer.model.base_model
    assert tuner.peft_config["default"].total_step == 12
    kept = sum(int((p != 0).sum()) for name, p in trainer.model.named_parameters() if "lora_E" in name)
    assert kept == 8 * 4  # of 12 in each of four projections


class Poisoned(Sentences):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        if index == 7:
            sample["labels"] = torch.full_like(sample["labels"], -100)
        return sample


class NaNModel(torch.nn.Module):
    """A loss that is NaN for a batch with a sample without labels."""

    def __init__(self):
        super().__init__()
        self.inner = llama()

    def forward(self, input_ids, labels, attention_mask):
        loss = self.inner(input_ids=input_ids, labels=labels, attention_mask=attention_mask).loss
        return {"loss": loss + torch.where((labels == -100).all(1).any(), torch.nan, 0.0)}


def test_a_nan_loss_names_the_step_and_the_samples(tmp_path):
    seen = []

    class Seen(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    trainer = FastLNTrainer(
        NaNModel(), arguments(tmp_path, save_strategy="no"), train_dataset=Poisoned(), callbacks=[Seen()]
    )
    with pytest.raises(FastLNError, match=r"not a number at step \d+ in the batch of samples .*\bs7\b") as caught:
        trainer.train()
    assert f"step {len(seen) + 1} " in str(caught.value)
    assert str(caught.value).count(", s") == 3


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ({"labels": torch.full((2, 3), -100)}, "no position of this batch has a label"),
        ({"labels": torch.ones(2, 3), "pixel_values": torch.tensor([1.0, torch.inf])}, "pixel_values holds NaN or inf"),
        ({"labels": torch.ones(2, 3), "attention_mask": torch.tensor([0.0, -torch.inf])}, None),
        ({}, None),
    ],
)
def test_a_nan_loss_has_the_reason_that_its_batch_shows(batch, reason):
    with pytest.raises(FastLNError, match=reason or "try a lower learning rate"):
        check_loss(torch.nan, 3, None, why_not_a_number(batch))


def test_a_batch_without_a_label_is_the_reason_for_a_nan_loss(tmp_path):
    class Unlabelled(Sentences):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample | {"labels": torch.full_like(sample["labels"], -100)}

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = llama()

        def forward(self, input_ids, labels):
            return {"loss": self.inner(input_ids=input_ids, labels=labels).loss}

    trainer = FastLNTrainer(Mean(), arguments(tmp_path, save_strategy="no"), train_dataset=Unlabelled())
    with pytest.raises(FastLNError, match=r"at step 1 .*: no position of this batch has a label \(all are -100\)"):
        trainer.train()


def test_a_dataset_without_a_sample_is_told(tmp_path):
    trainer = FastLNTrainer(llama(), arguments(tmp_path), train_dataset=Subset(Sentences(), []))
    with pytest.raises(FastLNError, match="train_dataset holds no sample"):
        trainer.train()


def test_ids_are_read_where_samples_have_them():
    collate = WithSampleIds(lambda samples: {"n": len(samples)})
    assert collate([{"qid": 3}, {"id": "a"}]) == {"n": 2, "fastln_sample_ids": ["3", "a"]}
    assert collate([{"id": "a"}, {}]) == {"n": 2}


def test_a_norm_that_stays_put_is_named(tmp_path):
    plain = (torch.optim.AdamW, {"lr": 1e-3})  # without float32 copies
    args = arguments(tmp_path, save_strategy="no", learning_rate=1e-3)
    trainer = FastLNTrainer(llama(), args, None, Sentences(), optimizer_cls_and_kwargs=plain)
    norm = trainer.model.model.layers[1].input_layernorm
    norm.weight.data = norm.weight.data.bfloat16()  # as a later .to(bfloat16) would
    with pytest.raises(FastLNError, match=r"^model.layers.1.input_layernorm.weight \(bfloat16\) did not move in 3 opt"):
        trainer.train()
    assert trainer.state.global_step == 2, "the error comes in the third step"


def test_a_norm_that_the_optimizer_does_not_have_is_named(tmp_path):
    model = llama()
    some = [p for name, p in model.named_parameters() if name != "model.norm.weight"]
    optimizers = (torch.optim.AdamW(some, lr=1e-2), None)
    trainer = FastLNTrainer(
        model, arguments(tmp_path, save_strategy="no"), train_dataset=Sentences(), optimizers=optimizers
    )
    with pytest.raises(FastLNError, match=r"^model.norm.weight \(float32\) did not move"):
        trainer.train()


def test_rates_too_small_to_tell_are_let_pass(tmp_path):
    trainer = train(tmp_path, save_strategy="no", learning_rate=1e-9)
    assert trainer.state.global_step == 12
    assert "model.norm.weight" not in moved(trainer, llama()), "1 - 1e-9 is 1 in float32"


def test_a_norm_that_turns_nan_is_named_and_not_the_loss(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.model.norm.weight.data[3] = torch.nan

    for every in (1, 50):  # found by the log, or by the next loss
        trainer = FastLNTrainer(
            llama(),
            arguments(tmp_path, save_strategy="no", logging_steps=every),
            train_dataset=Sentences(),
            callbacks=[Break()],
        )
        with pytest.raises(FastLNError, match=r"^model.norm.weight turned NaN or infinite by step [23];"):
            trainer.train()


def test_a_trained_norm_without_a_gradient_is_named(tmp_path, caplog):
    class Skipping(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.unused = llama(), torch.nn.LayerNorm(4)

        def forward(self, input_ids, labels):
            return {"loss": self.inner(input_ids=input_ids, labels=labels).loss}

    train(tmp_path, Skipping(), save_strategy="no")
    (told,) = [record.message for record in caplog.records if record.name == "fastln.watch"]
    assert "received no gradient in 12 steps" in told
    assert "unused.weight, unused.bias; leave norms out by name or pattern: scope='not:unused'" in told
    caplog.clear()
    train(tmp_path, Skipping(), save_strategy="no", scope="not:unused")
    assert [record.message for record in caplog.records if record.name == "fastln.watch"] == []


@pytest.mark.parametrize("engine", ["fastln", "torch"])
def test_activation_checkpointing_gives_the_same_losses_and_is_without_reentry(engine, tmp_path, caplog):
    reentrant = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with caplog.at_level("INFO", "fastln"):
        runs = [
            train(tmp_path, engine=engine, save_strategy="no", **settings)
            for settings in ({}, {"activation_checkpointing": True}, reentrant)
        ]
    plain, *others = ([row["loss"] for row in run.state.log_history if "loss" in row] for run in runs)
    for run, losses in zip(runs[1:], others, strict=True):
        assert run.model.is_gradient_checkpointing
        assert run.args.activation_checkpointing_kwargs == {"use_reentrant": False}
        assert losses == pytest.approx(plain, rel=1e-5)
    assert caplog.text.count("checkpoints are without reentry") == 1


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    args = arguments(
        tmp_path, load_best_model_at_end=True, metric_for_best_model="m", eval_strategy="steps", eval_steps=2
    )
    values = iter([1.0, 5.0, 2.0, 1.0, 1.0, 1.0])
    stopping = EarlyStoppingCallback(3)
    trainer = FastLNTrainer(
        llama(),
        args,
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        compute_metrics=lambda predictions: {"m": next(values)},
        callbacks=[stopping],
    )
    at_best = {}

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                at_best.update({name: p.detach().clone() for name, p in model.named_parameters()})

    trainer.add_callback(Keep())
    trainer.train()
    assert trainer.state.global_step == 10  # three times no better
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-10"}
    assert all(torch.equal(tensor, at_best[name]) for name, tensor in weights(trainer).items())


def test_model_init_makes_a_prepared_model_at_every_training(tmp_path):
    trainer = FastLNTrainer(
        args=arguments(tmp_path, save_strategy="no"), train_dataset=Sentences(), model_init=lambda trial: llama()
    )
    trainer.train()
    first = weights(trainer)
    trainer.train()
    assert moved(trainer, llama()) == set(norm_parameters(llama()))
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(trainer).items())


def test_the_saved_model_is_a_stock_one(tmp_path):
    trainer = train(tmp_path, save_strategy="no")
    trainer.save_model(str(tmp_path / "model"))
    loaded = type(llama()).from_pretrained(tmp_path / "model")
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, dict(loaded.named_parameters())[name])
    restored = fastln.restore(trainer.model)
    assert type(restored.model.norm) is type(llama().model.norm)


def test_what_the_method_does_not_find_is_told_before_training(tmp_path):
    model = llama()
    with pytest.raises(FastLNError, match="did you mean 'layernorm'"):
        FastLNTrainer(model, arguments(tmp_path), method="layernrm")
    assert all(parameter.requires_grad for parameter in model.parameters()), "the model stays as it was"

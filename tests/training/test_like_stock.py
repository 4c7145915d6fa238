"""A run of FastLNTrainer beside the same run of transformers' Trainer: losses, events, scores, checkpoints.

The stock model trains the same norms, and everything else is frozen by hand. What differs is rounding alone.
"""

import json

import numpy as np
import pytest
import torch
from small_run import Sentences, arguments, llama
from torch.nn import functional
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from fastln import FastLNTrainer
from fastln.methods import norm_parameters

EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]
OURS = {"gamma_shift", "samples_per_second", "tokens_per_second", "peak_memory_mib"}
TIMES = {"train_runtime", "eval_runtime", "test_runtime"}


class Recorder(TrainerCallback):
    """Notes every event: its name, the step, whether there are a model and an optimizer, and what is logged."""

    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if name not in EVENTS:
            return super().__getattribute__(name)

        def note(args, state, control, **kwargs):
            logs = sorted(set(kwargs.get("logs") or {}) - OURS)
            known = tuple(kwargs.get(key) is not None for key in ("model", "optimizer", "lr_scheduler"))
            self.events.append((name, state.global_step, known, logs))

        return note


def stock():
    model = llama()
    norms = set(norm_parameters(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in norms)
    return model


def both(folder, callbacks=(), settings=None, **others):
    """Return a stock trainer and one of ours, with the same arguments."""
    return [
        cls(
            make(),
            arguments(folder / cls.__name__, **({"max_steps": 6, "save_strategy": "no"} | (settings or {}))),
            callbacks=[make_one() for make_one in callbacks],
            **({"train_dataset": Sentences(), "eval_dataset": Sentences()} | others),
        )
        for cls, make in ((Trainer, stock), (FastLNTrainer, llama))
    ]


def history(trainer, *keys):
    return [row[key] for row in trainer.state.log_history for key in keys if key in row]


SETTINGS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "clipping": {"max_grad_norm": 1e-3},
    "cosine with warm-up": {"lr_scheduler_type": "cosine", "warmup_steps": 3},
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd"},
    "checkpointing": {"gradient_checkpointing": True},
    "noise on the embeddings": {"neftune_noise_alpha": 5.0},
    "part of an epoch": {"max_steps": -1, "num_train_epochs": 0.7},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 5},
    "dropped last batch": {"per_device_train_batch_size": 5, "dataloader_drop_last": True, "max_steps": 9},
}


@pytest.mark.slow(take=2)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_losses_and_gradient_norms_are_those_of_stock(settings, tmp_path):
    theirs, ours = both(tmp_path, settings=settings)
    results = []
    for trainer in (theirs, ours):
        torch.manual_seed(0)
        results.append(trainer.train())
    for keys in (("loss", "eval_loss"), ("grad_norm",), ("learning_rate",), ("epoch",)):
        assert history(ours, *keys) == pytest.approx(history(theirs, *keys), rel=2e-4), keys
    assert results[1].global_step == results[0].global_step > 3
    assert results[1].training_loss == pytest.approx(results[0].training_loss, rel=2e-4)
    left = dict(theirs.model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, left[name], rtol=1e-3, atol=1e-4, msg=name)


def test_bfloat16_by_autocast_is_as_near_to_float32_as_stock(tmp_path):
    exact, _ = both(tmp_path / "float32")
    theirs, ours = both(tmp_path, settings={"bf16": True})
    for trainer in (exact, theirs, ours):
        trainer.train()
    exact, theirs, ours = (np.array(history(trainer, "loss")) for trainer in (exact, theirs, ours))
    assert np.abs(ours - exact).max() <= 2 * np.abs(theirs - exact).max() + 1e-3


def test_callbacks_see_the_same_events(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    theirs, ours = both(tmp_path, callbacks=[Recorder], settings=settings)
    for trainer in (theirs, ours):
        trainer.train()
        trainer.predict(Sentences())
    recorded = [
        next(callback.events for callback in trainer.callback_handler.callbacks if isinstance(callback, Recorder))
        for trainer in (theirs, ours)
    ]
    assert recorded[1] == recorded[0]
    assert {name for name, *_ in recorded[0]} >= {
        "on_init_end",
        "on_train_begin",
        "on_save",
        "on_evaluate",
        "on_predict",
    }


def test_a_callback_can_stop_a_training_and_it_resumes(tmp_path):
    class StopAtThree(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_save = state.global_step == 3

    straight, _ = both(tmp_path / "straight")
    straight.train()
    theirs, ours = both(tmp_path, callbacks=[StopAtThree])
    for trainer in (theirs, ours):
        assert trainer.train().global_step == 3
    resumed, again = both(tmp_path)
    for trainer in (resumed, again):
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 6
        assert history(trainer, "loss") == pytest.approx(history(straight, "loss"), rel=2e-4)


@pytest.mark.parametrize("greater_is_better", [False, True])
def test_the_best_model_is_that_of_stock(greater_is_better, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}
    settings |= {"greater_is_better": greater_is_better}
    theirs, ours = both(tmp_path, settings=settings)
    for trainer in (theirs, ours):
        trainer.train()
    assert ours.state.best_metric == pytest.approx(theirs.state.best_metric, rel=2e-4)
    assert ours.state.best_global_step == theirs.state.best_global_step == (2 if greater_is_better else 6)
    names = [sorted(path.name for path in (tmp_path / kind).iterdir()) for kind in ("Trainer", "FastLNTrainer")]
    assert names[1] == names[0]
    assert ours.state.best_model_checkpoint == str(
        tmp_path / "FastLNTrainer" / f"checkpoint-{ours.state.best_global_step}"
    )
    assert ours.evaluate()["eval_loss"] == pytest.approx(ours.state.best_metric, rel=1e-6)


def test_early_stopping_stops_where_stock_does(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 8}
    settings |= {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    trainers = both(tmp_path, callbacks=[lambda: EarlyStoppingCallback(2)], settings=settings)
    assert [trainer.train().global_step for trainer in trainers] == [3, 3]


def test_scores_and_predictions_are_those_of_stock(tmp_path):
    def accuracy(prediction):
        right = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
        return {"right": float(right[prediction.label_ids[:, 1:] != -100].mean())}

    trainers = both(
        tmp_path,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        settings={"per_device_eval_batch_size": 7, "eval_accumulation_steps": 2},
    )
    for trainer in trainers:
        trainer.train()
    theirs, ours = (trainer.predict(Sentences()) for trainer in trainers)
    assert (ours.predictions == theirs.predictions).all()
    assert ours.metrics.keys() == theirs.metrics.keys()
    assert ours.metrics["test_right"] == theirs.metrics["test_right"]
    assert ours.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], rel=2e-4)


def test_a_loss_of_the_caller_is_used(tmp_path):
    def twice(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return 2 * functional.cross_entropy(logits, labels[:, 1:].flatten())

    theirs, ours = both(tmp_path, compute_loss_func=twice)
    for trainer in (theirs, ours):
        trainer.train()
    assert history(ours, "loss") == pytest.approx(history(theirs, "loss"), rel=2e-4)
    assert history(ours, "loss")[0] > 7


def test_a_stream_of_samples_is_trained_on(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from (Sentences()[index] for index in range(24))

    theirs, ours = both(tmp_path, train_dataset=Stream())
    for trainer in (theirs, ours):
        trainer.train()
    assert history(ours, "loss") == pytest.approx(history(theirs, "loss"), rel=2e-4)


def test_the_metrics_and_the_state_are_saved_where_stock_saves_them(tmp_path):
    for trainer in both(tmp_path):
        result = trainer.train()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    saved = [
        {path.name: json.loads(path.read_text()) for path in (tmp_path / kind).glob("*.json")}
        for kind in ("Trainer", "FastLNTrainer")
    ]
    assert saved[1].keys() == saved[0].keys()
    for name, values in saved[0].items():
        assert saved[1][name].keys() == values.keys(), name

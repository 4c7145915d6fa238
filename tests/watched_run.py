"""Runs of FastLNTrainer under FSDP2, some of which must stop: `forked.py watched_run.py FOLDER RUN...`.

Each process writes to FOLDER/RANK.json what each run ended with: the error, or γ's shifts.
"""

import json
import sys
from pathlib import Path

import torch
from sharded_run import allow_fsdp_on_cpus, sharding
from small_run import Sentences, arguments, llama
from torch import distributed, nn
from transformers import TrainerCallback

from fastln import FastLNError, FastLNTrainer
from fastln.methods import norm_parameters

NORM = "model.norm.weight"


class WithoutNorm(FastLNTrainer):
    """Its optimizer was not given one of the norms."""

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        left_out = self.model.get_parameter(NORM)
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter is not left_out]
        return optimizer


class Narrow(nn.Module):
    """Has a norm of one column, of which the second process has nothing, and whose weight gets zeros as gradients."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm = llama(), nn.LayerNorm(1)

    def forward(self, input_ids, labels, attention_mask):
        loss = self.inner(input_ids=input_ids, labels=labels, attention_mask=attention_mask).loss
        return {"loss": self.norm(loss[None])[0] + loss}


class NaNInOne(FastLNTrainer):
    """The loss of the second process is NaN in the second step."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * torch.nan if self.state.global_step == 1 and self.args.process_index == 1 else loss


class BreakShard(TrainerCallback):
    """Puts a NaN into what the second process has of a norm."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            model.get_parameter(NORM).detach().to_local()[0] = torch.nan


def loaded_by_the_first():
    """The model as `cpu_ram_efficient_loading` makes it: no other process than the first has its values."""
    model = llama()
    if distributed.get_rank():
        for name in norm_parameters(model):
            nn.init.constant_(model.get_parameter(name), 5.0)
    return model


RUNS = {
    "accumulating": (FastLNTrainer, llama, {"gradient_accumulation_steps": 2}, {}, []),
    "loaded by the first": (FastLNTrainer, loaded_by_the_first, {}, {"cpu_ram_efficient_loading": True}, []),
    "without a norm": (WithoutNorm, llama, {}, {}, []),
    "stuck, with an empty shard": (FastLNTrainer, Narrow, {}, {}, []),
    "NaN in a shard": (FastLNTrainer, llama, {}, {}, [BreakShard()]),
    "NaN in a shard, seen by the loss": (FastLNTrainer, llama, {"logging_steps": 50}, {}, [BreakShard()]),
    "NaN loss": (NaNInOne, llama, {}, {}, []),
}


def main(folder, names):
    allow_fsdp_on_cpus()
    distributed.init_process_group("gloo")
    found = {}
    for name in names:
        trainer_class, make, settings, fsdp, callbacks = RUNS[name]
        short = {"max_steps": 4, "save_strategy": "no", "per_device_train_batch_size": 2}
        args = arguments(folder, **(short | sharding(**fsdp) | settings))
        trainer = trainer_class(make(), args, train_dataset=Sentences(), callbacks=callbacks)
        try:
            trainer.train()
            found[name] = [row["gamma_shift"] for row in trainer.state.log_history if "loss" in row]
        except FastLNError as error:
            found[name] = str(error)
        (folder / f"{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""Runs that stop and go on, and what their models hold."""

import torch
from transformers import TrainerCallback


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(model, expected):
    return all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


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

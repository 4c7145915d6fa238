"""Two processes train a task, and the loss of the second is NaN in its second step: `forked.py task_run.py FOLDER`.

Each process writes to FOLDER/RANK.json the error that it ended with.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import tiny
import torch
from torch import distributed

from fastln import FastLNError
from fastln.training import TrainConfig, train_task
from fastln.training.task_trainer import TaskTrainer

stock = TaskTrainer.compute_loss


def nan_in_one(self, *args, **kwargs):
    loss = stock(self, *args, **kwargs)
    return loss * torch.nan if self.state.global_step == 1 and self.args.process_index == 1 else loss


def main(folder):
    rank = int(os.environ["RANK"])
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))  # one that waits in vain says so
    TaskTrainer.compute_loss = nan_in_one
    own = folder / str(rank)
    own.mkdir()
    data = tiny.phantom(24)
    task = tiny.blip(own, data)
    try:
        train_task(task, data, TrainConfig(epochs=2, batch_size=4), progress=False)
    except FastLNError as error:
        (folder / f"{rank}.json").write_text(json.dumps(str(error)))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

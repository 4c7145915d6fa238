"""Processes that save one model into the same folders again and again: `forked.py saving_run.py FOLDER`."""

import shutil
import sys
from pathlib import Path

import torch
from small_run import llama
from torch import distributed
from transformers import AutoModelForCausalLM

import fastln

N_TIMES = 20


def main(folder):
    distributed.init_process_group("gloo")
    base, model = llama(), fastln.prepare(llama())
    tuned = model.get_parameter("model.norm.weight")
    for n in range(N_TIMES):
        with torch.no_grad():
            tuned.fill_(n)
        if n % 2 and not distributed.get_rank():  # half of the times the folders are new
            shutil.rmtree(folder / "adapter")
            shutil.rmtree(folder / "merged")
        distributed.barrier()
        fastln.save_adapter(model, folder / "adapter")
        fastln.merge_adapter(model, folder / "merged")
        distributed.barrier()
        fastln.load_adapter(base, folder / "adapter")
        assert (base.model.norm.weight == n).all()
        assert (AutoModelForCausalLM.from_pretrained(folder / "merged").model.norm.weight == n).all()
        distributed.barrier()  # or a folder goes while the other process reads it
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

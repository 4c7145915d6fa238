"""Steps of two processes in storage modes: `forked.py storage_run.py FOLDER MODE...`.

Each process writes to FOLDER/RANK.json, for each mode and each way to share the work, the largest relative difference
between a gradient and that of one process that takes the whole batch with the same mode.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import int8_run
import torch
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM

import fastln


def prepared(mode):
    torch.manual_seed(0)
    return fastln.prepare(LlamaForCausalLM(LlamaConfig(**int8_run.SIZES, vocab_size=64)).train(), activations=mode)


WAYS = (int8_run.ddp, int8_run.ddp_that_accumulates, int8_run.sharded)


def main(folder, modes):
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))  # one that waits in vain says so
    rank, found = distributed.get_rank(), {}
    for mode in modes:
        whole = prepared(mode)
        int8_run.step(whole, int8_run.batch())
        want = int8_run.gradients(whole)
        for way in WAYS:
            model = prepared(mode)
            way(rank, model)
            got = int8_run.gradients(model)
            assert got.keys() == want.keys(), mode
            apart = max(((got[key] - grad).norm() / grad.norm()).item() for key, grad in want.items())
            found[f"{mode}, {way.__name__}"] = apart
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

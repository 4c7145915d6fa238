"""Steps of two processes with products in 8 bits: `forked.py int8_run.py FOLDER CASE...`.

Each process writes to FOLDER/RANK.json, for each case, its loss and the largest relative difference between a gradient
and that of one process that takes the whole batch, which every process computes for itself.
"""

import contextlib
import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import fastln
from fastln.ops import OpSettings
from fastln.ops.backends import resolve

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
BACKEND = "auto" if resolve("int8_linear", torch.device("cpu"), OpSettings()).backend == "cpu" else "reference"


def prepared(dtype=torch.float32, seed=0, **settings):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64)).to(dtype)
    return fastln.prepare(model, products="int8", backend=BACKEND, **settings)


def batch():
    ids = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def part(i, n):
    """Return the i-th of n parts of the batch."""
    return {name: tensor.chunk(n)[i] for name, tensor in batch().items()}


def gradients(model):
    """Return the trained parameters' gradients, whole, by their names in the model itself."""
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def step(model, *batches, waiting=contextlib.nullcontext):
    """Run forward and backward on each batch, all but the last in the context `waiting`, and return the mean loss."""
    losses = []
    for i, given in enumerate(batches):
        with waiting() if i + 1 < len(batches) else contextlib.nullcontext():
            losses.append(model(**given).loss / len(batches))
            losses[-1].backward()
    return sum(losses).item()


def ddp(rank, model):
    return step(DistributedDataParallel(model), part(rank, 2))


def ddp_that_accumulates(rank, model):
    model = DistributedDataParallel(model)
    return step(model, part(rank, 4), part(rank + 2, 4), waiting=model.no_sync)


def ddp_that_checkpoints(rank, model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return ddp(rank, model.train())


def sharded(rank, model):
    for layer in model.model.layers:
        fully_shard(layer)
    return step(fully_shard(model), part(rank, 2))


def sharded_and_loaded(rank, model):
    """Load the values of other shards, which are rounded again; then a model's own, which change nothing."""
    other = prepared(seed=1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    want = sharded(rank, model)
    shards, loss = model.state_dict(), sharded(rank, other)
    assert all(torch.equal(shard.full_tensor(), state[name]) for name, shard in shards.items())
    assert loss != want
    for _ in range(2):
        other.load_state_dict(shards)
        other.zero_grad()
        assert abs(step(other, part(rank, 2)) / want - 1) < 1e-3  # the weights were rounded twice, to 8 and 8 bits
    before = other.state_dict()
    model.load_state_dict(shards)
    model.zero_grad()
    assert step(model, part(rank, 2)) == want
    other.load_state_dict(before)
    assert all(
        torch.equal(shard.full_tensor(), before[name].full_tensor()) for name, shard in other.state_dict().items()
    )
    return want


CASES = {
    function.__name__: function
    for function in (ddp, ddp_that_accumulates, ddp_that_checkpoints, sharded, sharded_and_loaded)
}


def main(folder, names):
    distributed.init_process_group("gloo", timeout=timedelta(seconds=120))  # one that waits in vain says so
    rank, found = distributed.get_rank(), {}
    for name in names:
        whole, model = prepared(), prepared()
        assert {p.dtype for p in model.parameters()} == {torch.float32, torch.int8}
        want_loss = step(whole, batch())
        loss, want = CASES[name](rank, model), gradients(whole)
        got = gradients(model)
        assert got.keys() == want.keys(), name
        apart = max(((got[key] - grad).norm() / grad.norm()).item() for key, grad in want.items())
        found[name] = {"loss": loss, "whole loss": want_loss, "apart": apart}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

"""A small run of FastLNTrainer whose model FSDP2 shards: `forked.py sharded_run.py FOLDER DTYPE MAX_STEPS STATE`.

STATE is the `state_dict_type` of its checkpoints; it goes on from one where there is one. As a single process it trains
without FSDP: the losses to compare with.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from small_run import Sentences, arguments, llama
from torch.distributed.tensor import DTensor

from fastln import FastLNTrainer, save_adapter
from fastln.families import find_norms
from fastln.training.checkpoints import checkpoints_in


def allow_fsdp_on_cpus():
    """Have accelerate shard on CPUs, where it runs plain DDP in place of the FSDP that it was asked for."""
    stock = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            # As accelerate does: from here every later state is told.
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def sharding(**config):
    """The Trainer's settings for FSDP2."""
    layers = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    return {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": {"version": 2, **layers, **config}}


def main(folder, dtype, max_steps, state_dict_type):
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {"max_steps": max_steps, "lr_scheduler_type": "constant"}
    if n_processes > 1:
        allow_fsdp_on_cpus()
        settings |= sharding(state_dict_type=state_dict_type)
    args = arguments(folder, per_device_train_batch_size=4 // n_processes, **settings)
    model = llama().to(dtype)
    trainer = FastLNTrainer(model, args, train_dataset=Sentences(), norm_learning_rate=0.02)
    trainer.train(resume_from_checkpoint=bool(checkpoints_in(folder)))
    save_adapter(trainer.model, folder / "adapter")
    sharded = [isinstance(parameter, DTensor) for parameter in trainer.model.parameters()]
    trained = {
        f"{name}.{own}": (p.full_tensor() if isinstance(p, DTensor) else p).tolist()
        for name, norm in find_norms(trainer.model)
        for own, p in norm.named_parameters(recurse=False)
    }
    dtypes = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
    if trainer.is_world_process_zero():
        rows = [row for row in trainer.state.log_history if "loss" in row]
        logged = {key: [row[key] for row in rows] for key in ("loss", "gamma_shift")}
        found = {**logged, "trained": trained, "sharded": all(sharded), "dtypes": sorted(dtypes)}
        (folder / "result.json").write_text(json.dumps(found))
    if n_processes > 1:  # or its threads may still be at work when the process ends
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3]), sys.argv[4])

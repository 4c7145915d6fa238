"""A small run of FastLNTrainer as a script, `python small_run.py FOLDER SETTINGS`: trains, or goes on where it can.

The tests kill it, launch it as several processes, and compare what it leaves in FOLDER/result.json. SETTINGS are
TrainingArguments as JSON.
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from fastln import FastLNTrainer
from fastln.training.checkpoints import checkpoints_in


class Sentences(Dataset):
    """Sequences of twelve tokens, each of which says what the next is; not all have as many labels."""

    def __getitem__(self, index):
        ids = (torch.arange(12) * (index % 5 + 1) + index) % 50 + 3
        labels = ids.clone()
        labels[: index % 4] = -100
        return {"id": f"s{index}", "input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}

    def __len__(self):
        return 24


def llama(**settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, **settings))


def arguments(folder, **settings):
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    short = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    return TrainingArguments(str(folder), **quiet, **(short | {"save_steps": 2, "save_total_limit": 2} | settings))


def main(folder, settings, dropout=0.0):
    args = arguments(folder, **settings)
    trainer = FastLNTrainer(llama(attention_dropout=dropout), args, train_dataset=Sentences(), norm_learning_rate=0.02)
    trainer.train(resume_from_checkpoint=bool(checkpoints_in(folder)))
    if trainer.is_world_process_zero():
        trained = {name: p.tolist() for name, p in trainer.model.named_parameters() if p.requires_grad}
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        (folder / "result.json").write_text(json.dumps({"trained": trained, "losses": losses}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

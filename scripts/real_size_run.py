"""Train, evaluate and merge a model of real size: BLIP-VQA with 361 million parameters, the paper's small model.

The model has random weights. It trains on a few of the embedded questions, with images of 480² and batches of two. This
takes some minutes on a CPU. The script trains without interruption, and again with a kill at the first checkpoint and a
resume. Then it evaluates, merges the adapter into the base, and compares bit for bit what must be equal.

    python scripts/real_size_run.py --out runs/real-size
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import BlipConfig

from fastln.data import load_dataset, load_source
from fastln.models import load_task

COUNTS = {"train": 8, "test": 4}
SIZE = 480
MODEL = "model.safetensors"


def write_data(folder: Path) -> None:
    """Write some of the embedded questions as files, as a user's data would be."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, count in COUNTS.items():
        data = load_dataset("phantom", split)
        rows = []
        for sample in data.samples[:count]:
            name = f"{sample.image}.png".replace("/", "-")
            data.image(sample.image).save(folder / "images" / name)
            rows.append({"image": name, "question": sample.question, "answer": sample.answer})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_base(folder: Path, data: Path) -> None:
    """Write the model with random weights, created from a configuration alone."""
    vision = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": SIZE,
        "initializer_range": 0.02,  # with BlipConfig's default, 1e-10, the tower gets almost no gradient
    }
    text = {"vocab_size": 30524, "encoder_hidden_size": 768, "num_attention_heads": 12}
    configuration = folder.with_suffix(".json")
    configuration.write_text(BlipConfig(vision_config=vision, text_config=text).to_json_string())
    questions = load_source(str(data)).dataset("train")
    load_task(f"blip:{configuration}", questions, dtype=torch.bfloat16).save(folder)


def fastln(*words: object) -> subprocess.Popen[str]:
    """Start a fastln command, as a user would."""
    return subprocess.Popen([sys.executable, "-m", "fastln", *map(str, words)], text=True, stdout=subprocess.PIPE)


def finished(process: subprocess.Popen[str], *words: str) -> list[str]:
    """Wait for a command, and return the lines of its output that contain any of the words.

    Raises:
        SystemExit: If the command failed.
    """
    printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args!r}: exit status {process.returncode}")
    return [line for line in printed.splitlines() if any(word in line for word in words)]


def same(one: Path, other: Path) -> str:
    """Compare two files of tensors.

    Raises:
        SystemExit: If they differ.
    """
    first, second = load_file(one), load_file(other)
    if first.keys() != second.keys() or not all(torch.equal(second[name], tensor) for name, tensor in first.items()):
        raise SystemExit(f"{one} and {other} differ")
    return f"{len(first)} tensors equal, bit for bit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/real-size"), help="a new folder; takes 4 GB")
    out = parser.parse_args().out
    data, base = out / "data", out / "base"
    out.mkdir(parents=True)
    write_data(data)
    write_base(base, data)
    train = (
        "train",
        "--model",
        f"blip:{base}",
        "--data",
        data,
        "--batch-size",
        2,
        "--epochs",
        3,
        "--dtype",
        "bfloat16",
    )
    print("predicted:", *finished(fastln(*train, "--dry-run"), "parameters", "memory"), sep="\n  ")
    finished(fastln(*train, "--out", out / "undisturbed"))
    record = json.loads((out / "undisturbed" / "run.json").read_text())
    n_steps = len(record["training"]["losses"])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"undisturbed: {n_steps} steps in {record['training']['seconds']:.0f} s, peak {peak:,.0f} MiB", end="")
    print(f" (of the process), adapter {record['adapter_bytes']:,} bytes")
    killed = fastln(*train, "--out", out / "killed")
    while not any((out / "killed" / "checkpoints").glob("checkpoint-*")):
        if killed.poll() is not None:
            raise SystemExit("it ended before its first checkpoint")
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    finished(fastln(*train, "--out", out / "killed", "--resume"))
    print("killed and resumed:", same(out / "killed/model" / MODEL, out / "undisturbed/model" / MODEL))
    evaluation = fastln("eval", out / "killed", "--data", data, "--metrics", out / "killed.json")
    print("evaluated:", *finished(evaluation, "exact match"))
    adapter = out / "killed" / "adapter"
    finished(fastln("eval", f"blip:{base}", "--data", data, "--adapter", adapter, "--metrics", out / "adapter.json"))
    scores = [json.loads((out / name).read_text()) for name in ("killed.json", "adapter.json")]
    if any(scores[0][name] != scores[1][name] for name in scores[0].keys() - {"model"}):
        raise SystemExit("the base model with the adapter has different scores")
    finished(fastln("merge", adapter, "--base", base, "--out", out / "merged"))
    print("merged:", same(out / "merged" / MODEL, out / "killed/model" / MODEL))


if __name__ == "__main__":
    main()

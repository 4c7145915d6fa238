"""A run killed at any moment and resumed ends with an undisturbed one's weights; two processes have one's losses."""

import json
import shutil

import pytest
import small_run
import tiny
import torch
from kill_run import N_STEPS
from launch import HERE, TORCHRUN, TWO, result, script

pytestmark = pytest.mark.timeout(900)  # many processes, which import everything: minutes on a busy machine
MANY = pytest.mark.slow(take=0)  # dozens of runs, one after the other


@pytest.mark.parametrize(
    ("how", "first", "last"),
    [
        ("saving", 5, 7),
        pytest.param("saving", 1, 60, marks=MANY),
        *[pytest.param("random", 24, seed, marks=MANY) for seed in range(2)],
    ],
)
def test_killed_and_resumed_it_ends_with_the_same_bits(how, first, last, tmp_path):
    words = script(HERE / "kill_run.py", tmp_path, how, first, last).split()
    n_killed = int(words[words.index("killed") + 1].rstrip(","))
    # An attempt that comes near the end may come through.
    assert n_killed >= 0.8 * (first if how == "random" else last - first + 1)
    assert result(tmp_path / "killed") == result(tmp_path / "straight")
    left = {path.name for path in (tmp_path / "killed").iterdir()}
    assert left == {"result.json", *(f"checkpoint-{N_STEPS[how] - i}" for i in (1, 0))}


@pytest.mark.slow(pool="processes", take=2)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_have_the_losses_of_one(accumulate, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    shared = {"gradient_accumulation_steps": accumulate, "save_steps": 4}
    small_run.main(one, shared | {"per_device_train_batch_size": 4})
    half = json.dumps(shared | {"per_device_train_batch_size": 2, "ddp_backend": "gloo"})
    script(HERE / "small_run.py", two, half, python=TWO)
    torch.testing.assert_close(torch.tensor(result(two)["losses"]), torch.tensor(result(one)["losses"]))
    for name, values in result(one)["trained"].items():
        torch.testing.assert_close(torch.tensor(result(two)["trained"][name]), torch.tensor(values), msg=name)
    # And the run of two goes on from the checkpoint of two, bit for bit.
    whole = result(two)
    (two / "result.json").unlink()
    shutil.rmtree(two / "checkpoint-12")
    script(HERE / "small_run.py", two, half, python=TWO)
    assert result(two) == whole


@pytest.mark.slow(pool="processes", take=2)
def test_two_processes_of_the_command_line_take_the_whole_schedule_and_one_of_them_writes(tmp_path):
    tiny.blip_config().to_json_file(tmp_path / "tiny.json")
    out = tmp_path / "out"
    words = {"model": f"blip:{tmp_path / 'tiny.json'}", "data": "phantom", "out": out, "dtype": "float32"}
    small = {"epochs": 2, "batch_size": 120}
    script("-m", "fastln", "train", *(f"{key}={value}" for key, value in (words | small).items()), python=TORCHRUN)
    log = [json.loads(line) for line in (out / "checkpoints" / "log.jsonl").read_text().splitlines()]
    # 960 questions are 8 batches an epoch, 4 for each process.
    assert [row["step"] for row in log] == list(range(1, 9))
    assert log[0]["lr"] == 0
    assert max(row["lr"] for row in log) == 3e-3
    assert log[-1]["lr"] < 0.1 * 3e-3
    assert json.loads((out / "run.json").read_text())["finished"]

"""Running the scripts beside the tests, as one process or several."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
TWO = (sys.executable, HERE / "forked.py")
"""Two processes, at the price of importing everything once."""


def script(*arguments, python=(sys.executable,)):
    """Run one of the scripts here with one thread, as many as everywhere, so that sums come in the same order."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*map(str, (*python, *arguments))], env=environment, cwd=HERE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def result(folder):
    return json.loads((folder / "result.json").read_text())

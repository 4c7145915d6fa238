"""Two processes that measure different rates settle on one dtype: `forked.py dtype_run.py FOLDER`."""

import json
import os
import sys
from pathlib import Path

import torch

from fastln import rates


def main() -> None:
    rank = int(os.environ["RANK"])
    speed = {torch.float32: 1 + rank, torch.bfloat16: 2 - rank}  # the second process finds float32 faster
    rates.has_bfloat16_units = lambda device: True
    rates.matrix_rate = lambda device, dtype, **options: float(speed[dtype])
    dtype = rates.settle_dtype("auto", torch.device("cpu"))
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(str(dtype)))


if __name__ == "__main__":
    main()

"""Several processes: which is the first, before and after torch.distributed joins them."""

import pytest
from torch import distributed

from fastln.processes import is_first_process


@pytest.mark.parametrize(
    ("torchrun", "joined", "is_first"),
    [
        ({}, None, True),  # a process alone
        ({"RANK": "0", "WORLD_SIZE": "2"}, None, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, None, False),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 1, False),
        ({"RANK": "1"}, None, True),  # a number that jobs beside each other were given
        ({}, 0, True),  # joined by something else than torchrun
        ({}, 1, False),
        ({"RANK": "1", "WORLD_SIZE": "2"}, 0, True),  # a smaller group, or ranks given anew
    ],
)
def test_one_process_is_the_first(torchrun, joined, is_first, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "is_initialized", lambda: joined is not None)
    monkeypatch.setattr(distributed, "get_rank", lambda: joined)
    assert is_first_process() == is_first

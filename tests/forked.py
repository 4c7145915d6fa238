"""Runs a script beside it as two processes, as torchrun does: `python forked.py SCRIPT ARGUMENT...`.

They are forks of this process, which has imported everything once; torchrun would have three processes import it.
"""

import os
import runpy
import signal
import socket
import sys
import traceback

# What the scripts import. Nothing of it may start threads, which a fork does not have.
import accelerate  # noqa: F401
from transformers import BertForSequenceClassification, LlamaForCausalLM, Trainer  # noqa: F401

import fastln.training.fastln_trainer  # noqa: F401

N_PROCESSES = 2


def main(script, arguments):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [_forked(rank, port, script, arguments) for rank in range(N_PROCESSES)]
    failed = 0
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            failed = status
            for other in children:  # it would wait for the one that failed
                os.kill(other, signal.SIGKILL)
    sys.exit(bool(failed))


def _forked(rank, port, script, arguments):
    """Fork a process that runs the script, and return its number."""
    child = os.fork()
    if child:
        return child
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": N_PROCESSES, "LOCAL_WORLD_SIZE": N_PROCESSES}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    sys.argv = [script, *arguments]
    status = 1
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

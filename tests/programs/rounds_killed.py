"""Runs `round run FILE` in child processes, each killed at its n-th flush of a file, or answer; then to its end.

Prints the stage that the ledger had last at each kill, one a line.
"""

import json
import os
import signal
import sys
from pathlib import Path

# All before the first fork, also what is imported when it is used: a child begins with nothing computed.
import accelerate  # noqa: F401
import jsonargparse  # noqa: F401
import matplotlib.figure  # noqa: F401
import pyarrow.parquet  # noqa: F401
import scipy.stats  # noqa: F401
import sklearn.metrics  # noqa: F401
import torch._dynamo  # noqa: F401
from pycocotools import cocoeval  # noqa: F401

from diffdoctor.annotate.queue import Queue
from diffdoctor.cli import main
from diffdoctor.rounds import command  # noqa: F401


def child(file: str, left: int) -> None:
    def counted(real):
        def call(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return call

    os.fsync, Queue.submit = counted(os.fsync), counted(Queue.submit)
    os._exit(main(["round", "run", file]))


file, output, *points = sys.argv[1:]
for point in [*map(int, points), 10**9]:
    if (pid := os.fork()) == 0:
        child(file, point)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == -signal.SIGKILL:
        ledger = Path(output) / "ledger.jsonl"
        lines = ledger.read_text().splitlines() if ledger.is_file() else []
        print(json.loads(lines[-1])["stage"] if lines else "nothing", flush=True)
    elif status != 0:
        sys.exit(status)

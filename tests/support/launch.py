"""Commands in several processes, as users start them."""

import contextlib
import os
import random
import socket
import subprocess
import sys

from support.paths import ROOT, TESTS


def environment(**more):
    """The environment of a process that imports this checkout and the tests' support, and computes in one thread."""
    path = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def free_port():
    """A free port, below those that a system hands out by itself, so that no other program is given it meanwhile."""
    for port in random.SystemRandom().sample(range(12000, 30000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port in 100 tries")


def launched(*arguments, processes=2):
    """The finished `accelerate launch … -m diffdoctor` with these arguments on the CPU; raises where it fails."""
    # With --cpu, accelerate starts one process, whatever is asked of it.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"]
    done = subprocess.run(
        [*command, "-m", "diffdoctor", *map(str, arguments)],
        env=environment(ACCELERATE_USE_CPU="true"),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def group_of(count):
    """What is added to the environment of each of `count` processes, so that they are one group on the CPU."""
    group = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
    }
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]

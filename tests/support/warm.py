"""A process that has imported what programs need and forks one for each run: imports take longer than most runs."""

import contextlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from support.launch import environment, group_of


class WarmProgram:
    """Runs of `main`, a program's or another's, each in a process of its own; a context.

    Args:
        program: the file, whose import and `warm_up`, where it has one, are done once. Neither may start a thread.
    """

    def __init__(self, program: Path):
        command = [sys.executable, "-m", "support.warm", str(program)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment(), text=True, start_new_session=True, **pipes)

    def run(self, *arguments, output: Path, count: int = 1, program: Path | None = None, **more: str) -> str:
        """Call `main(*arguments)` in one process, or in those of one group; returns what the first one printed.

        Args:
            *arguments: of `main`, as JSON values or paths.
            output: where what each process says is written, by this name with an ending.
            count: of processes.
            program: another one, whose `main` is called; each process imports it, and finds what the first imported.
            **more: added to their environment.
        """
        ranks = [more] if count == 1 else [{**rank, **more} for rank in group_of(count)]
        job = {"arguments": arguments, "output": str(output), "environments": ranks, "program": program}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(job, default=str), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()[-4000:]
        said = [Path(f"{output}.{rank}.err").read_text() for rank in range(count)]
        assert not any(json.loads(line)), "\n".join(said)[-4000:]
        return Path(f"{output}.0.out").read_text()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def warm_program(name: str):
    """What a fixture yields from: a warm process of a file of `programs`; the test is skipped where nothing forks."""
    import pytest

    from support.paths import PROGRAMS

    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    with WarmProgram(PROGRAMS / name) as program:
        yield program


def _child(main, job: dict, rank: int) -> None:
    code = 1
    try:
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{job['output']}.{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), descriptor)
        os.environ.update(job["environments"][rank])
        # As processes that were started apart: no two draw the same unless they are seeded.
        random.seed()
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        (_load(job["program"]).main if job["program"] else main)(*job["arguments"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _load(program: str):
    spec = importlib.util.spec_from_file_location(Path(program).stem, program)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _serve(program: str) -> None:
    module = _load(program)
    getattr(module, "warm_up", lambda: None)()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        job = json.loads(line)
        children = []
        for rank in range(len(job["environments"])):
            sys.stdout.flush()
            if (child := os.fork()) == 0:
                _child(module.main, job, rank)
            children.append(child)
        print(json.dumps([os.waitpid(child, 0)[1] for child in children]), file=answers, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])

"""What the parts of `tools.gpu` share: the folder, the time that is left, and commands that end at a limit."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from benchmarks.ops.machine import ROOT

#: Characters of one command's output that gpu.log keeps: its beginning and its end.
LOGGED = (100_000, 400_000)
#: A group of its own, so that a command ends with everything it started.
_GROUP = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


class PartError(Exception):
    """Why a part has no result. `text`: all that its command printed; `found`: what there is nevertheless."""

    def __init__(self, reason: str, text: str = "", found: dict | None = None):
        super().__init__(reason)
        self.text = text
        self.found = found or {}


class Context:
    """One run: where results go, when it must end, what was found so far. Parts may use it from several threads.

    Args:
        output: folder of the results.
        deadline: `time.monotonic()` by which everything has ended.
        commit: what the rows name where the checkout has no .git.
        described: the GPU as `gpu()` returns it, where it is known already.
    """

    def __init__(self, output: pathlib.Path, deadline: float, commit: str | None = None, described: dict | None = None):
        self.output, self.deadline, self.commit = output, deadline, commit
        self.found: dict[str, dict] = {}
        self._scratch = tempfile.TemporaryDirectory(prefix="diffdoctor-gpu-")
        self.scratch = pathlib.Path(self._scratch.name)
        self._described = described
        self._asking, self._logging = threading.Lock(), threading.Lock()
        self._alive: set[subprocess.Popen] = set()

    def gpu(self) -> dict:
        """The GPU's machine row and the versions. Raises PartError where there is none."""
        with self._asking:
            if self._described is None:
                try:
                    text = self.run([sys.executable, "-m", "tools.gpu.probe", "describe"], 120)
                    self._described = last_json(text)
                except PartError as error:
                    self._described = {"reason": f"needs a GPU: {error}"}
        if "reason" in self._described:
            raise PartError(self._described["reason"])
        return self._described

    def arch(self) -> str:
        """The compute capability as nvcc and Triton write it: 90."""
        return self.gpu()["machine"]["gpu_capability"].replace(".", "")

    def jobs(self, cores_each: int, most: int) -> int:
        """How many processes to start at once: by cores, and 4 GiB of the GPU's memory for each."""
        machine = self.gpu()["machine"]
        by_memory = int(machine.get("gpu_memory_gib", 16) // 4)
        return max(1, min(most, machine.get("cores", 1) // cores_each, by_memory))

    def seconds_left(self, reserve: float = 0.0) -> float:
        return self.deadline - time.monotonic() - reserve

    def run(self, command: list[str], limit: float, **environment: str) -> str:
        """The command's output, also appended to gpu.log. Raises PartError: exit code, or out of time."""
        limit = min(limit, self.seconds_left())
        if limit <= 1:
            raise PartError("left out for lack of time")
        began = time.monotonic()
        # A file, not a pipe: what a killed command left running would keep a pipe open.
        with tempfile.TemporaryFile() as printed:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment, **_GROUP,
            )  # fmt: skip
            self._alive.add(process)
            try:
                # What stops the run may have come between the start of the process and its being noted.
                code = process.wait(max(0.0, min(limit, self.seconds_left())))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _kill(process)
                self._alive.discard(process)
            printed.seek(0)
            text = printed.read().decode(errors="replace")
        self._log(command, time.monotonic() - began, text)
        if code is None:
            raise PartError(f"ran past its {limit:.0f} s; the end of what it said: {tail(text)}", text)
        if code:
            raise PartError(f"exit code {code}: {tail(text)}", text)
        return text

    def run_all(self, commands: list[list[str]], limit: float, **environment: str) -> list[tuple[str, str | None]]:
        """All commands at once; for each (its output, None or why it failed)."""

        def one(command):
            try:
                return self.run(command, limit, **environment), None
            except PartError as error:
                return error.text, str(error)

        with ThreadPoolExecutor(len(commands)) as pool:
            return list(pool.map(one, commands))

    def end(self) -> None:
        """Kill what still runs."""
        for process in list(self._alive):
            _kill(process)

    def _log(self, command, seconds, text):
        first, last = LOGGED
        if len(text) > first + last:
            text = f"{text[:first]}\n… {len(text) - first - last} characters left out …\n{text[-last:]}"
        with self._logging, (self.output / "gpu.log").open("a") as file:
            file.write(f"\n$ {' '.join(command)}   # {seconds:.1f} s\n{text}")


def _kill(process: subprocess.Popen) -> None:
    """End the process and its group; one that has ended may have left others behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(text: str, length: int = 400) -> str:
    """The last line: where a traceback names its error."""
    return (text.strip().splitlines() or ["nothing was printed"])[-1].strip()[-length:]


def json_lines(text: str) -> list[dict]:
    """Every line that is a JSON object."""
    found = []
    for line in text.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def last_json(text: str) -> dict:
    """The last such line. Raises PartError where there is none."""
    found = json_lines(text)
    if not found:
        raise PartError(f"printed no JSON: {tail(text)}", text)
    return found[-1]

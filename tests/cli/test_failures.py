"""Whatever ends a command is one line and an exit code; what cannot be printed ends nothing."""

import dataclasses
import errno
import io
import os
import sys
import threading

import pytest

from diffdoctor import cli
from diffdoctor.cli.streams import tolerant_streams
from diffdoctor.runs.errors import UserError
from diffdoctor.runs.progress import track


@dataclasses.dataclass
class NoOptions:
    """Options of a command."""


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a command that is a function; returns the exit code and what was printed on standard error."""
    monkeypatch.setattr(cli.failures.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(cli.COMMANDS, "it", cli.Command("summary", "options", "run"))

    def call(function):
        monkeypatch.setattr(cli, "_load", lambda path: NoOptions if path == "options" else function)
        code = cli.main(["it"])
        return code, capsys.readouterr().err

    return call


def raising(error):
    def function(config):
        raise error

    return function


def chained(error, cause):
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/manifest.parquet")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("seed: expected 1,\ngot 2"), "seed: expected 1, got 2"),
        (
            UserError("x\nTraceback (most recent call last):\n\ndiffdoctor.runs.errors.UserError: size: small"),
            "size: small",
        ),
        (FULL, "out/manifest.parquet: No space left on device"),
        (OSError("no number"), "no number"),
        (chained(RuntimeError("the writer failed"), FULL), "out/manifest.parquet: No space left on device"),
        (MemoryError(), "memory ran out; smaller batches and pictures need less"),
        (SystemExit(0), "something called exit(0) while the command ran"),
    ],
    ids=["user", "of-a-worker", "disk", "no-number", "disk-behind-another", "memory", "exit"],
)
def test_what_is_foreseen_is_one_line(run, tmp_path, error, line):
    assert run(raising(error)) == (2, f"diffdoctor it: error: {line}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ZeroDivisionError("division by zero\nsecond line"), "ZeroDivisionError: division by zero"),
        (KeyError(), "KeyError"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "UnicodeEncodeError: 'utf-8' codec"),
        (
            RuntimeError("Caught\nTraceback (most recent call last):\n  x\nValueError: of a worker"),
            "ValueError: of a worker",
        ),
    ],
    ids=["message", "none", "surrogate", "worker"],
)
def test_what_nobody_foresaw_is_one_line_that_names_its_traceback(run, tmp_path, error, line):
    code, errors = run(raising(error))
    (kept,) = tmp_path.iterdir()
    assert code == 2
    assert errors.startswith(f"diffdoctor it: error: {line}")
    assert errors.endswith(f"(traceback in {kept})\n")
    assert errors.count("\n") == 1
    assert "in raising" in kept.read_text() or "in function" in kept.read_text()


def test_a_variable_shows_the_traceback_of_any_error(run, monkeypatch):
    monkeypatch.setenv("DIFFDOCTOR_TRACEBACK", "1")
    code, errors = run(raising(UserError("seed")))
    assert code == 2
    assert "Traceback (most recent call last)" in errors
    assert errors.endswith("diffdoctor it: error: seed\n")


def test_the_error_comes_after_the_progress(run):
    def function(config):
        for item in track(range(3), desc="it", unit="item"):
            if item == 2:
                raise UserError("seed")

    code, errors = run(function)
    done, error = errors.splitlines()
    assert (code, done[:12], error) == (2, "it: 2/3 item", "diffdoctor it: error: seed")


def test_ctrl_c_has_its_own_exit_code(run):
    code, errors = run(raising(KeyboardInterrupt()))
    assert code == 130
    assert errors.count("\n") == 1


@pytest.mark.parametrize(("error", "code"), [(FULL, 2), (ValueError("none of ours"), 0)], ids=["disk", "other"])
def test_what_ends_another_thread_prints_no_traceback(run, error, code):
    def function(config):
        thread = threading.Thread(target=lambda: raising(error)(config))
        thread.start()
        thread.join()

    expected = "diffdoctor it: error: out/manifest.parquet: No space left on device\n" if code else ""
    assert run(function) == (code, expected)


class FailsWhenRemoved:
    def __del__(self):
        raise ValueError("write to closed file")


def test_what_fails_once_more_when_it_is_removed_prints_no_traceback(run):
    def function(config):
        writer = FailsWhenRemoved()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), repr(type(writer).__name__))

    code, errors = run(function)
    assert code == 2
    assert errors.count("\n") == 1


class Broken(io.StringIO):
    """A stream that takes so many letters and then raises."""

    def __init__(self, error, letters=0):
        super().__init__()
        self.error, self.letters = error, letters

    def write(self, text):
        if self.tell() + len(text) > self.letters:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    ("error", "code"),
    [(BrokenPipeError(errno.EPIPE, "Broken pipe"), 0), (OSError(errno.ENOSPC, "No space left on device"), 2)],
    ids=["pipe", "disk"],
)
def test_an_output_that_breaks_does_not_end_the_work(run, monkeypatch, error, code):
    done = []

    def function(config):
        for number in range(5):
            print("result", number, flush=True)
            done.append(number)

    monkeypatch.setattr(sys, "stdout", Broken(error, 10))
    ended, errors = run(function)
    assert done == [0, 1, 2, 3, 4]
    assert ended == code
    assert errors == ("diffdoctor: error: standard output: [Errno 28] No space left on device\n" if code else "")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_an_encoding_cannot_hold_is_escaped(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with tolerant_streams() as lost:
        print("K\xe4se \u624b \udce4")
    assert lost == []
    assert (
        raw.getvalue().decode(encoding).strip()
        == {
            "ascii": "K\\xe4se \\u624b \\udce4",
            "cp1252": "K\xe4se \\u624b \\udce4",
            "utf-8": "K\xe4se \u624b \\udce4",
        }[encoding]
    )


def test_streams_that_the_shell_closed_are_no_error(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    def function(config):
        print("result")
        print("notice", file=sys.stderr)
        assert not sys.stderr.isatty()

    assert run(function)[0] == 0


def test_libraries_are_told_to_print_errors_alone(run, monkeypatch):
    names = ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY")
    monkeypatch.setenv(names[0], "info")  # what the user chose stays
    monkeypatch.delenv(names[1], raising=False)
    seen = []
    assert run(lambda config: seen.extend(os.environ[name] for name in names)) == (0, "")
    assert seen == ["info", "error"]

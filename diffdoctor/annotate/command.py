"""The `diffdoctor annotate` commands that run a server, add people, and report."""

from __future__ import annotations

import sys
import threading

from diffdoctor.annotate.config import (
    AnnotateAgreementConfig,
    AnnotateServeConfig,
    AnnotateStatusConfig,
    AnnotateTokenConfig,
)
from diffdoctor.annotate.project import Project
from diffdoctor.annotate.report import write_agreement, write_status
from diffdoctor.annotate.status import status_of
from diffdoctor.runs.errors import DoubtfulResult, UserError, expected
from diffdoctor.runs.files import atomic_write_json
from diffdoctor.runs.lock import locked_folder
from diffdoctor.web.serve import needs_starlette, serve_until_interrupted

_DAY = 24 * 3600.0


def run_annotate_serve(config: AnnotateServeConfig) -> int:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: there is no project, another server has it, or the address cannot be listened at.
    """
    with needs_starlette():
        from diffdoctor.annotate.server import build_app

    project = Project(config.project)
    assist = _assist(config.assist)

    def build(hosts: list[str], scheme: str):
        threading.Thread(target=_back_up, args=(project, stop), daemon=True).start()
        return build_app(project, hosts, scheme=scheme, assist=assist)

    stop = threading.Event()
    with locked_folder(project.folder):
        try:
            serve_until_interrupted(config, build, lambda url: [f"{url}/#token={_own_token(project)}"], config.names)
        finally:
            stop.set()
    return 0


def _assist(path: str | None):
    if path is None:
        return None
    from diffdoctor.runs.functions import function_from_file

    return function_from_file(path)[0]


def _own_token(project: Project) -> str:
    """A new token of whoever started the server."""
    return project.store.add_person("admin", "admin")


def _back_up(project: Project, stop: threading.Event) -> None:
    """A copy of the database a day."""
    while True:
        try:
            project.store.backup()
        except Exception as error:
            print(f"annotate serve: no backup was made ({error})", file=sys.stderr, flush=True)
        if stop.wait(_DAY / 24):
            return


def run_annotate_token(config: AnnotateTokenConfig) -> int:
    """Add a person, or give one a new token, and print it: only its hash is kept.

    Raises:
        UserError: there is no project, or nobody of this name to shut out.
    """
    project = Project(config.project)
    if config.disable:
        if not project.store.disable(config.name):
            raise UserError(expected("name", "that of somebody with a token", repr(config.name)))
        print(f"{config.name}: shut out")
        return 0
    print(project.store.add_person(config.name, config.role))
    print(f"{config.name} opens the server's address with /#token= and this; it is not shown again", file=sys.stderr)
    return 0


def run_annotate_status(config: AnnotateStatusConfig) -> int:
    """Print how far a project is, and write status.html.

    Raises:
        UserError: there is no project.
        DoubtfulResult: with `strict`, the record has been tampered with.
    """
    project = Project(config.project)
    status = status_of(project)
    path = write_status(project, status)
    done, wanted = status["labels"]["done"], status["labels"]["wanted"]
    print(f"{done:,} of {wanted:,} labels are there: {path}")
    for fault in status["faults"]:
        print(f"warning: {fault}", file=sys.stderr)
    if status["faults"] and config.strict:
        raise DoubtfulResult(f"{project.store.path}: {status['faults'][0]}")
    return 0


def run_annotate_agreement(config: AnnotateAgreementConfig) -> int:
    """Measure how well raters agree, and write agreement.html and agreement.json.

    Raises:
        UserError: there is no project.
    """
    from diffdoctor.annotate.agreement import measure_agreement

    project = Project(config.project)
    found = measure_agreement(project, bootstrap=config.bootstrap, seed=config.seed)
    atomic_write_json(project.folder / "agreement.json", found)
    path = write_agreement(project, found)
    alpha = found["all"]["pixel_alpha"]
    shown = "not defined" if alpha is None else f"{alpha:.2f}"
    print(f"pixel alpha {shown} over {found['all']['pictures']} pictures with two answers or more: {path}")
    return 0

"""Running the annotation server."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from diffdoctor.annotate.project import Project
from diffdoctor.runs.errors import UserError, missing_extra

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def hosts_of(host: str, port: int, names: tuple[str, ...] = ()) -> list[str]:
    """The values of the Host header that a server at this address is reached by."""
    bare = [*LOOPBACK, *names] if host in (*LOOPBACK, "0.0.0.0", "::") else [host, *names]
    found = [f"[{name}]" if ":" in name else name for name in bare]
    default = [name for name in found if port in (80, 443)]
    return [f"{name}:{port}" for name in found] + default


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: the address cannot be listened at.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(128)
    except OSError as error:
        raise UserError(f"{host}:{port}: cannot listen there ({error.strerror or error})") from error
    return sock


def make_server(app, *, certificate: str | None = None, key: str | None = None):
    """A uvicorn server that trusts no header of a proxy and names nothing of itself."""
    try:
        import uvicorn
    except ImportError:
        raise missing_extra("uvicorn", "annotate") from None
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=256,
            timeout_keep_alive=15,
            h11_max_incomplete_event_size=2**15,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
    )


@contextlib.contextmanager
def running(project: Project, *, host: str = "127.0.0.1", port: int = 0, assist=None) -> Iterator[str]:
    """Serve from a thread inside the context; yields the address, such as http://127.0.0.1:40123."""
    from diffdoctor.annotate.server import build_app

    with listening(host, port) as sock:
        port = sock.getsockname()[1]
        server = make_server(build_app(project, hosts_of(host, port), assist=assist))
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        try:
            yield f"http://{host}:{port}"
        finally:
            server.should_exit = True
            thread.join(10)

"""Running a server for browsers."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffdoctor.runs.errors import UserError, expected, missing_extra

# So long a server that is to end waits for requests that are still sent.
END_SECONDS = 5
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@contextlib.contextmanager
def needs_starlette() -> Iterator[None]:
    """Inside, a module that needs starlette is imported; says what to install where that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "starlette":
            raise
        raise missing_extra("starlette", "annotate") from None


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
        # On Windows SO_REUSEADDR would let another program take the port while this one listens.
        exclusive = getattr(socket, "SO_EXCLUSIVEADDRUSE", None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR if exclusive is None else exclusive, 1)
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
            timeout_graceful_shutdown=END_SECONDS,
            h11_max_incomplete_event_size=2**15,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
    )


@contextlib.contextmanager
def running(build: Callable[[list[str]], Any], *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve from a thread inside the context; yields the address, such as http://127.0.0.1:40123.

    Args:
        build: from the values of the Host header that are served to the application.
        host: address to listen at.
        port: to listen at; 0: any that is free.
    """
    with listening(host, port) as sock:
        port = sock.getsockname()[1]
        server = make_server(build(hosts_of(host, port)))
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        try:
            yield f"http://{host}:{port}"
        finally:
            server.should_exit = True
            thread.join(10)


def check_address(config: Any) -> None:
    """Refuse an address that others would reach unasked; `config` has the options host, port, allow_remote,
    certificate and key.

    Raises:
        UserError: names the option, what was expected and what came.
    """
    if not 0 <= config.port <= 65535:
        raise UserError(expected("port", "a number in [0, 65535]", config.port))
    if config.host not in LOOPBACK and not config.allow_remote:
        raise UserError(expected("host", "this machine's loopback, or --allow_remote true", config.host))
    if (config.certificate is None) != (config.key is None):
        raise UserError(expected("certificate, key", "both or none", "one of them"))


def serve_until_interrupted(
    config: Any,
    build: Callable[[list[str], str], Any],
    links: Callable[[str], Sequence[str]],
    names: Sequence[str] | None = None,
) -> None:
    """Serve an application until Ctrl-C.

    Args:
        config: has the options host, port, open, allow_remote, certificate and key.
        build: from the values of the Host header that are served, and http or https, to the application.
        links: from the server's address to the lines that are printed, the first of which may be opened in a browser.
        names: further names by which browsers reach the server.

    Raises:
        UserError: the address cannot be listened at.
    """
    scheme = "http" if config.certificate is None else "https"
    with listening(config.host, config.port) as sock:
        port = sock.getsockname()[1]
        app = build(hosts_of(config.host, port, tuple(names or ())), scheme)
        server = make_server(app, certificate=config.certificate, key=config.key)
        if config.allow_remote and config.certificate is None:
            print("warning: without --certificate, tokens and pictures can be read on the way", file=sys.stderr)
        lines = links(_address((names or [config.host])[0], scheme, port))
        print("\n".join([*lines, "Ctrl-C ends"]), flush=True)
        if config.open:
            import webbrowser

            webbrowser.open(lines[0].split()[-1])
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[sock])


def _address(host: str, scheme: str, port: int) -> str:
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

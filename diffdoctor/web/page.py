"""A page: its files, which every browser may have, and what it asks, behind the guard."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from diffdoctor.web.guard import ASGI, Guard

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "png": "image/png"}
_NOT_MODIFIED = 304


def guarded_page(
    package: str,
    routes: Iterable[Route],
    person_of: Callable[[str], Any],
    hosts: Iterable[str],
    *,
    scheme: str = "http",
    name: str = "serve",
) -> ASGI:
    """An application of a page in plain modules and of what it asks.

    Args:
        package: whose folder `static` has the page, index.html, and its files; those that all pages share are added.
        routes: what the page asks.
        person_of: from a token to the person who has it; None: nobody.
        hosts: values of the Host header that are served, with their port.
        scheme: http or https.
        name: of the command, in the server's log.
    """
    files = _static_files("diffdoctor.web") | _static_files(package)
    app = Starlette(routes=[*(Route(path, _static(*file)) for path, file in files.items()), *routes])
    app.router.redirect_slashes = False  # it would build an address from the Host header
    return Guard(app, person_of, hosts, files, scheme=scheme, name=name)


def _static_files(package: str) -> dict[str, tuple[bytes, str]]:
    """{path: (bytes, media type)} of a page's files, read once: no path of a request ever names a file."""
    found = {}
    for file in resources.files(package).joinpath("static").iterdir():
        kind = _TYPES.get(file.name.rpartition(".")[2])
        if kind is not None:
            path = "/" if file.name == "index.html" else f"/static/{file.name}"
            found[path] = (file.read_bytes(), kind)
    return found


def _static(data: bytes, kind: str) -> Callable:
    tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "no-cache"}

    async def serve(request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=_NOT_MODIFIED, headers=headers)
        return Response(data, media_type=kind, headers=headers)

    return serve

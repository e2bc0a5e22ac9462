"""Reading requests and writing answers, within limits."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from diffdoctor.annotate.masks import MAX_BODY, Inflater, as_object, largest_envelope, open_envelope
from diffdoctor.annotate.queue import Refused
from diffdoctor.annotate.schema import ROLES
from diffdoctor.runs.errors import UserError, expected

_MAX_JSON = 2**16


class Ask:
    """A request whose body was read.

    Attributes:
        person: the row of who asks.
        params: of the path.
        query: of the address.
        headers: of the request.
        body: not compressed.
    """

    def __init__(self, request: Request, body: bytes):
        self.person, self.params, self.body = request.scope["person"], request.path_params, body
        self.query, self.headers = request.query_params, request.headers

    @property
    def me(self) -> int:
        """The id of who asks."""
        return self.person["id"]

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; an empty one is {}."""
        return as_object(self.body) if self.body else {}

    def envelope(self, shape: tuple[int, int], allowed: tuple[str, ...]) -> tuple[dict, dict[str, np.ndarray]]:
        """The body as JSON values and planes."""
        return open_envelope(self.body, *shape, allowed)

    def require(self, role: str) -> None:
        """Refuse who has less than a role.

        Raises:
            Refused: 403.
        """
        if ROLES.index(self.person["role"]) < ROLES.index(role):
            raise Refused(403, expected("role", role, self.person["role"]))


def endpoint(answer: Callable[[Ask], Response], most: Callable[[Request], int] | None = None) -> Callable:
    """A Starlette endpoint of a function that runs in a thread.

    Args:
        answer: from what was asked to the response.
        most: bytes to which a gzip body may inflate; None: the body is a little JSON, or nothing.
    """

    async def serve(request: Request) -> Response:
        try:
            limit = None if most is None else await run_in_threadpool(most, request)
            ask = Ask(request, await _body(request, limit))
            return await run_in_threadpool(answer, ask)
        except Refused as error:
            return JSONResponse({"error": str(error), **error.fields}, error.status)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)

    return serve


async def _body(request: Request, inflated: int | None) -> bytes:
    """A request's body, read as far as it may go."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    coding = request.headers.get("content-encoding", "identity").lower()
    wanted = ("application/json", "identity") if inflated is None else ("application/octet-stream", "gzip")
    limit, size, inflater = MAX_BODY if inflated else _MAX_JSON, 0, Inflater(inflated or 0)
    parts = []
    async for part in request.stream():
        if not part:
            continue
        if (kind, coding) != wanted:
            raise Refused(415, expected("Content-Type, Content-Encoding", ", ".join(wanted), f"{kind}, {coding}"))
        size += len(part)
        if size > limit:
            raise Refused(413, expected("body", f"at most {limit:,} bytes", "more"))
        if inflated is None:
            parts.append(part)
        else:
            await run_in_threadpool(inflater.add, part)
    return b"".join(parts) if inflated is None else inflater.finished()


def envelope_limit(size_of: Callable[[int], tuple[int, int]]) -> Callable[[Request], int]:
    """How large an envelope may be for the task in a request's path."""

    def most(request: Request) -> int:
        return largest_envelope(*size_of(request.path_params["task"]))

    return most


def raw(pixels: np.ndarray | bytes, headers: dict[str, str] | None = None) -> Response:
    """Bytes, compressed, which the page's fetch undoes."""
    data = pixels if isinstance(pixels, bytes) else np.ascontiguousarray(pixels).tobytes()
    headers = {"Content-Encoding": "gzip", **(headers or {})}
    return Response(gzip.compress(data, 1, mtime=0), media_type="application/octet-stream", headers=headers)


def png(picture: np.ndarray) -> bytes:
    """A picture (H, W, 3) uint8 as PNG without metadata, fast rather than small."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()

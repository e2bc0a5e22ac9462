"""Reading requests and writing answers, within limits."""

from __future__ import annotations

import asyncio
import io
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from diffdoctor.runs.errors import UserError, expected
from diffdoctor.web.bodies import MAX_BODY, MAX_JSON, Inflater, Refused, as_object

if TYPE_CHECKING:
    import numpy as np


class Ask:
    """A request whose body was read.

    Attributes:
        person: who asks.
        params: of the path.
        query: of the address.
        headers: of the request.
        body: not compressed.
    """

    def __init__(self, request: Request, body: bytes):
        self.person, self.params, self.body = request.scope["person"], request.path_params, body
        self.query, self.headers = request.query_params, request.headers

    def json(self) -> dict[str, Any]:
        """The body as a JSON object; an empty one is {}."""
        return as_object(self.body) if self.body else {}


def endpoint(
    answer: Callable[[Any], Response], most: Callable[[Request], int] | None = None, ask: type[Ask] = Ask
) -> Callable:
    """A Starlette endpoint of a function that runs in a thread.

    Args:
        answer: from what was asked to the response.
        most: bytes to which a gzip body may inflate; None: the body is a little JSON, or nothing.
        ask: class of what `answer` takes.
    """

    async def serve(request: Request) -> Response:
        try:
            body = await _body(request, most)
            return await run_in_threadpool(answer, ask(request, body))
        except Refused as error:
            return JSONResponse({"error": str(error), **error.fields}, error.status)
        except UserError as error:
            return JSONResponse({"error": str(error)}, 400)
        except (ClientDisconnect, asyncio.CancelledError):  # gone before it had sent all, or the server ends
            return Response(status_code=400)

    return serve


class _Body:
    """A request's body as far as it may go, part by part.

    Args:
        request: of which.
        inflated: bytes to which a gzip body may inflate; None: the body is a little JSON, or nothing.
    """

    def __init__(self, request: Request, inflated: int | None):
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        self.got = kind, request.headers.get("content-encoding", "identity").lower()
        self.wanted = ("application/json", "identity") if inflated is None else ("application/octet-stream", "gzip")
        self.limit = MAX_JSON if inflated is None else MAX_BODY
        self.size, self.parts = 0, []
        self.inflater = None if inflated is None else Inflater(inflated)

    def add(self, part: bytes) -> None:
        self.size += len(part)
        if self.got != self.wanted:
            names = ", ".join(self.got)
            raise Refused(415, expected("Content-Type, Content-Encoding", ", ".join(self.wanted), names))
        if self.size > self.limit:
            raise Refused(413, expected("body", f"at most {self.limit:,} bytes", "more"))
        if self.inflater is None:
            self.parts.append(part)
        else:
            self.inflater.add(part)

    def finished(self) -> bytes:
        return b"".join(self.parts) if self.inflater is None else self.inflater.finished()


async def _body(request: Request, most: Callable[[Request], int] | None) -> bytes:
    """A request's body, not compressed; see `endpoint`.

    What is refused is read on, up to a limit: a browser that is answered while it still sends reports a lost connection
    instead of the answer.
    """
    fault, body, size = None, None, 0
    try:
        body = _Body(request, None if most is None else await run_in_threadpool(most, request))
    except UserError as error:
        fault = error
    async for part in request.stream():
        size += len(part)
        if fault is None and part:
            try:
                await run_in_threadpool(body.add, part)
            except UserError as error:
                fault = error
        elif size > 2 * MAX_BODY:
            break
    if fault is not None:
        raise fault
    return body.finished()


def png(picture: np.ndarray) -> bytes:
    """A picture (H, W, 3) uint8 as PNG without metadata, fast rather than small.

    Run lengths alone take a quarter less time than the lowest level (2.1 s against 2.9 s for a noisy picture of 4096 x
    4096 on one core) and as many bytes.
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()

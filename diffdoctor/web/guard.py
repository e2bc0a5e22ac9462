"""What every request must pass before it is looked at, and what every answer carries.

All is decided by the ASGI scope's own path and headers: an address put together from the Host header, as
`request.url` is, can be made to differ from the path that is served.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from diffdoctor.runs import strict_json
from diffdoctor.runs.errors import first_line

Scope = dict[str, Any]
ASGI = Callable[[Scope, Callable, Callable], Awaitable[None]]

CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
]
WRONG_TOKENS = 10  # a minute and address
_MINUTE = 60.0
# Addresses whose wrong tokens are remembered.
_MOST_ADDRESSES = 4096


class Guard:
    """ASGI middleware: Host, Origin, token, and the headers of all answers.

    The person of the token is `scope["person"]` for what it protects.

    Args:
        app: what it protects.
        person_of: from a token to the person who has it; None: nobody.
        hosts: values of the Host header that are served, with their port.
        open_paths: paths served without a token.
        scheme: of the server's own address, http or https.
        name: of the command, in the server's log.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        app: ASGI,
        person_of: Callable[[str], Any],
        hosts: Iterable[str],
        open_paths: Iterable[str],
        *,
        scheme: str = "http",
        name: str = "serve",
        clock: Callable[[], float] = time.monotonic,
    ):
        self.app, self.person_of, self.name, self.clock = app, person_of, name, clock
        self.hosts, self.open_paths = {host.lower() for host in hosts}, set(open_paths)
        self.origins = {f"{scheme}://{host}" for host in self.hosts}
        self._wrong: dict[str, deque[float]] = {}

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        begun = False

        async def sending(message: dict) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                own = {name for name, _ in HEADERS}
                kept = [pair for pair in message["headers"] if pair[0].lower() not in own]
                if not any(name.lower() == b"cache-control" for name, _ in kept):
                    kept.append((b"cache-control", b"no-store"))
                message = {**message, "headers": [*kept, *HEADERS]}
            await send(message)

        status, reason, person = self._checked(scope)
        if reason:
            await _refuse(sending, status, reason)
            return
        try:
            await self.app({**scope, "person": person}, receive, sending)
        except Exception as error:
            # What failed stands in the server's log alone.
            print(f"{self.name}: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
            if begun:
                raise
            await _refuse(sending, 500, "the server failed; its log says why")

    def _checked(self, scope: Scope) -> tuple[int, str, Any]:
        """Status and reason of a refusal, or 0, "" and the person."""
        headers = [(name.lower(), value.decode("latin-1")) for name, value in scope["headers"]]
        if reason := self._foreign(headers, scope):
            return 403, reason, None
        if scope["path"] in self.open_paths:
            return 0, "", None
        address = (scope.get("client") or ("",))[0]
        if self._is_limited(address):
            return 429, "too many wrong tokens; wait a minute", None
        tokens = [value for name, value in headers if name == b"authorization"]
        kind, _, token = tokens[0].partition(" ") if len(tokens) == 1 else ("", "", "")
        person = self.person_of(token.strip()) if kind.lower() == "bearer" and token.strip() else None
        if person is None:
            if tokens:
                self._count(address)
            return 401, "no token, or not one that is known", None
        return 0, "", person

    def _foreign(self, headers: list[tuple[bytes, str]], scope: Scope) -> str:
        """Why a request does not come from our own page, where it does not."""
        found = {
            name: [value for key, value in headers if key == name]
            for name in (b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode")
        }
        if len(found[b"host"]) != 1 or found[b"host"][0].lower() not in self.hosts:
            return "a Host that is not served here"
        if any(value.lower() not in self.origins for value in found[b"origin"]):
            return "an Origin that is not this server's"
        # The page itself may be opened from anywhere: it holds nothing.
        opened = scope["path"] == "/" and scope["method"] == "GET" and found[b"sec-fetch-mode"] == ["navigate"]
        if not opened and any(value not in ("same-origin", "none") for value in found[b"sec-fetch-site"]):
            return "a request of another site"
        return ""

    def _is_limited(self, address: str) -> bool:
        times, now = self._wrong.get(address), self.clock()
        while times and times[0] <= now - _MINUTE:
            times.popleft()
        return bool(times) and len(times) >= WRONG_TOKENS

    def _count(self, address: str) -> None:
        if len(self._wrong) >= _MOST_ADDRESSES:
            self._wrong.clear()
        self._wrong.setdefault(address, deque()).append(self.clock())


async def _refuse(send: Callable, status: int, reason: str) -> None:
    body = strict_json.dumps({"error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 429:
        headers.append((b"retry-after", b"60"))
    # The body was not read: the connection is not used again.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def token_hash(token: str) -> str:
    """What is kept of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()

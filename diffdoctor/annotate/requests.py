"""What the annotation page asks: by whom, and with which masks."""

from __future__ import annotations

import gzip
from collections.abc import Callable

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from diffdoctor.annotate.masks import largest_envelope, open_envelope
from diffdoctor.annotate.schema import ROLES
from diffdoctor.runs.errors import expected
from diffdoctor.web import requests
from diffdoctor.web.bodies import Refused


class Ask(requests.Ask):
    """A request whose body was read; `person` is a row of the annotators."""

    @property
    def me(self) -> int:
        """The id of who asks."""
        return self.person["id"]

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

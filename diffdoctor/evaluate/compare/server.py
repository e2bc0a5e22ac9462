"""The server of the page, as an ASGI application; which picture is whose stays here."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable

from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from diffdoctor.evaluate.compare.answers import People, Queue
from diffdoctor.runs.errors import UserError, expected
from diffdoctor.web.bodies import Refused, count_of, text_of
from diffdoctor.web.guard import ASGI
from diffdoctor.web.page import guarded_page
from diffdoctor.web.requests import Ask, endpoint, png

_MOST_MS = 24 * 3_600_000


def build_app(
    queue: Queue, people: People, question: str, hosts: Iterable[str], *, scheme: str = "http", comparison: str = ""
) -> ASGI:
    """The application: the page, and what it asks, behind the guard.

    Args:
        queue: of the pairs.
        people: who is let in.
        question: that the page asks.
        hosts: values of the Host header that are served, with their port.
        scheme: http or https.
        comparison: what tells this comparison from others, by which pages keep answers that have not arrived.
    """
    ours = _Endpoints(queue, question, comparison)
    table = [
        ("GET", "me", ours.me),
        ("POST", "next", ours.next),
        ("GET", "pairs/{pair:int}/{side}", ours.picture),
        ("PUT", "pairs/{pair:int}", ours.answer),
    ]
    routes = [Route(f"/api/{path}", endpoint(answer), methods=[verb]) for verb, path, answer in table]
    package = "diffdoctor.evaluate.compare"
    return guarded_page(package, routes, people.person_of, hosts, scheme=scheme, name="evaluate compare")


class _Endpoints:
    def __init__(self, queue: Queue, question: str, comparison: str):
        self.queue, self.about = queue, {"question": question, "comparison": comparison}
        # As PNG without metadata, whatever the files are: nothing but the pixels tells the sides apart.
        self._png = functools.lru_cache(maxsize=32)(lambda place: png(place.read()))

    def me(self, ask: Ask) -> Response:
        """Who asks, and how far the work is."""
        counts = self.queue.counts(ask.person)
        return JSONResponse({"name": ask.person, **self.about, "counts": counts})

    def next(self, ask: Ask) -> Response:
        """The pair that a tab shows next."""
        index = self.queue.take(ask.person, text_of(ask.json(), "tab"))
        shown = {"pair": index, "counts": self.queue.counts(ask.person)}
        return JSONResponse(shown if index is None else {**shown, "prompt": self.queue.pairs[index].prompt})

    def picture(self, ask: Ask) -> Response:
        """One of a pair's pictures, as PNG."""
        index, side = self._pair(ask), ask.params["side"]
        if side not in ("left", "right"):
            raise Refused(404, expected("side", "left or right", side[:20]))
        which = self.queue.left(ask.person, index)
        if side == "right":
            which = "ab"[which == "a"]
        try:
            data = self._png(getattr(self.queue.pairs[index], which))
        except UserError as error:  # whose message names the file, and so whose picture it is
            print(f"evaluate compare: {error}", file=sys.stderr, flush=True)
            self.queue.leave_out(index)
            raise Refused(422, "a picture of this pair cannot be read; it is left out") from None
        return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    def answer(self, ask: Ask) -> Response:
        """Keep an answer."""
        index, fields = self._pair(ask), ask.json()
        if (choice := text_of(fields, "choice")) not in ("left", "right", "neither"):
            raise UserError(expected("choice", "left, right or neither", repr(choice)))
        version, ms = count_of(fields, "version", 1, 10_000), count_of(fields, "ms", 0, _MOST_MS)
        row = self.queue.put(ask.person, index, choice, version, ms)
        return JSONResponse({"version": row["version"], "counts": self.queue.counts(ask.person)})

    def _pair(self, ask: Ask) -> int:
        index = ask.params["pair"]
        if not index < len(self.queue.pairs):
            raise Refused(404, expected("pair", "the number of one", str(index)[:20]))
        return index

"""`diffdoctor serve-detector`: a detector that other programs ask over HTTP."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from diffdoctor.runs.errors import UserError, check_least, expected, first_line
from diffdoctor.version import __version__


@dataclasses.dataclass
class ServeDetectorConfig:
    """Options of `diffdoctor serve-detector`.

    Attributes:
        detector: the detector's folder or hub id, the published checkpoint's .bin file, or FILE.py:FUNCTION.
        host: address to listen at. Whoever reaches it can use the detector: there is no password.
        port: to listen at; 0: any that is free.
        device: such as cpu or cuda:1; null: the fastest there is.
        max_bytes: largest picture file that is read.
        max_pixels: largest picture that is decoded.
    """

    detector: str
    host: str = "127.0.0.1"
    port: int = 8765
    device: str | None = None
    max_bytes: int = 64 * 2**20
    max_pixels: int = 2**25

    def __post_init__(self):
        check_least(self, max_bytes=1, max_pixels=1)
        if not 0 <= self.port <= 65535:
            raise UserError(expected("port", "a number in [0, 65535]", self.port))


# A refused body is still read for so long and so far: a client that has not sent all of it sees no answer else.
_LINGER_SECONDS, _LINGER_BYTES = 30.0, 2**30


class RefusedRequest(Exception):
    """What is wrong with a request: an HTTP status and one line."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class DetectorServer(ThreadingHTTPServer):
    """Answers POSTs of one picture, in any format that `data.codec` reads.

    `/` and `/map` give the confidence map as a grey PNG of 16 bits; `/regions` gives what `diagnose` lists as
    components, `{"regions": [{"box": [x0, y0, x1, y1], "score": s}]}`; `/reward` gives `{"reward": 1 - flagged share,
    "flagged": bool}`. A GET says which detector it is. What is wrong with a request is one line of text.

    Args:
        detector: in evaluation mode, on its device.
        config: address and limits.
    """

    daemon_threads = True

    def __init__(self, detector, config: ServeDetectorConfig):
        self.detector, self.config = detector, config
        self.lock = threading.Lock()  # one picture at a time goes through the network
        super().__init__((config.host, config.port), _Handler)

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.server_address[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def confidence(self, body: bytes) -> np.ndarray:
        """The map (H, W) of an encoded picture.

        Raises:
            RefusedRequest: it is no picture, or too large.
        """
        from diffdoctor.data.pictures import to_images
        from diffdoctor.detector.confidence import confidence_of
        from diffdoctor.training.devices import device_of

        picture = self._decode(body)
        with self.lock:
            return (
                confidence_of(self.detector, to_images(picture[None], device_of(self.detector)))[0, 0]
                .float()
                .cpu()
                .numpy()
            )

    def handle_error(self, request, client_address) -> None:
        """One line, and none for a client that has gone."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            print(f"serve-detector: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)

    def _decode(self, body: bytes) -> np.ndarray:
        from diffdoctor.data.codec import FORMATS, UnreadablePicture, decode
        from diffdoctor.detector.predict import takes

        limit, too_large = self.config.max_pixels, []

        def check(height: int, width: int) -> str | None:
            if height * width > limit or not takes(self.detector, height, width):
                what = f"at most {limit:,} pixels" if height * width > limit else "a size that the detector takes whole"
                too_large.append(expected("picture", what, f"{width} x {height}"))
            return "too large" if too_large else None

        try:
            return decode(body, "RGB", check=check)
        except UnreadablePicture as error:
            if too_large:
                raise RefusedRequest(413, too_large[0]) from error
            raise RefusedRequest(400, expected("body", f"a picture ({', '.join(FORMATS)})", error)) from error


class _Handler(BaseHTTPRequestHandler):
    server: DetectorServer
    server_version = f"diffdoctor/{__version__}"
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self):
        self._send(200, "application/json", json.dumps({"detector": self.server.config.detector}).encode())

    def do_POST(self):
        self._unread = self._length()
        try:
            kind, answer = self._answer()
        except RefusedRequest as error:
            self.close_connection = True  # the body may not have been read
            self._send(error.status, "text/plain; charset=utf-8", f"{error}\n".encode())
            self._linger()
        except (ConnectionError, TimeoutError):
            raise  # nobody is there to be answered
        except Exception as error:
            print(f"serve-detector: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
            self._send(500, "text/plain; charset=utf-8", f"{first_line(error)}\n".encode())
        else:
            self._send(200, kind, answer)

    def _answer(self) -> tuple[str, bytes]:
        from diffdoctor.detector.predict import describe_map
        from diffdoctor.viz.draw import map_png

        if self.path not in ("/", "/map", "/regions", "/reward"):
            raise RefusedRequest(404, expected("path", "/map, /regions or /reward", repr(self.path)))
        confidence = self.server.confidence(self._body())
        if self.path in ("/", "/map"):
            return "image/png", map_png(confidence, 16)
        found = describe_map("", confidence)
        if self.path == "/reward":
            answer = {"reward": 1 - found["flagged_share"], "flagged": found["flagged"]}
        else:
            answer = {"regions": [_region(component) for component in found["components"]]}
        return "application/json", json.dumps(answer, allow_nan=False).encode()

    def _body(self) -> bytes:
        length, most = self._unread, self.server.config.max_bytes
        if length is None:
            got = repr(self.headers.get("Content-Length", ""))
            raise RefusedRequest(411, expected("Content-Length", "the number of bytes", got))
        if length > most:
            raise RefusedRequest(413, expected("body", f"at most {most:,} bytes", f"{length:,}"))
        self._unread = 0
        return self.rfile.read(length)

    def _length(self) -> int | None:
        """What the client says that it sends."""
        length = self.headers.get("Content-Length", "")
        return int(length) if length.isdecimal() and len(length) < 20 else None

    def _linger(self) -> None:
        left, end = min(self._unread or 0, _LINGER_BYTES), time.monotonic() + _LINGER_SECONDS
        while left > 0 and time.monotonic() < end and (data := self.rfile.read1(min(left, 2**16))):
            left -= len(data)

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """No line for each request."""


def _region(component: dict) -> dict:
    x, y, width, height = component["box"]
    return {"box": [x, y, x + width, y + height], "score": component["score"]}


def run_serve_detector(config: ServeDetectorConfig) -> int:
    """Serve until Ctrl-C.

    Raises:
        UserError: no detector is there, or the address cannot be listened at.
    """
    from diffdoctor.detector.confidence import check_detector
    from diffdoctor.detector.models.load import open_detector
    from diffdoctor.training.processes import Processes

    detector = open_detector(config.detector).to(Processes(config.device).device).eval()
    check_detector(detector)
    try:
        server = DetectorServer(detector, config)
    except OSError as error:
        raise UserError(f"{config.host}:{config.port}: cannot listen there ({error.strerror})") from error
    with server:
        print(f"{server.url}: POST a picture to /map, /regions or /reward; Ctrl-C ends", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0

"""S3 on loopback, behind a server that fails as stores do: errors, answers cut short, answers lost."""

import contextlib
import http.client
import random
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from support.paths import PROGRAMS

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def serving(folder):
    """A server of `programs/s3_server.py` with an empty bucket; its port. Its requests stand in `folder`/s3.log."""
    with open(folder / "s3.log", "w") as log:
        process = subprocess.Popen([sys.executable, str(PROGRAMS / "s3_server.py")], stdout=log)
    try:
        for _ in range(600):
            if (said := (folder / "s3.log").read_text()).endswith("\n"):
                break
            time.sleep(0.05)
        yield int(said.splitlines()[0])
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def failing(port, share, seed=0):
    """A server before another that fails for a share of the requests; its port and {fault: how often}."""
    draws, lock, counts = random.Random(seed), threading.Lock(), {"500": 0, "cut": 0, "lost": 0}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                fault = draws.choice(list(counts)) if draws.random() < share else ""
            if fault == "500":
                counts[fault] += 1
                return self.answer(500, {"Content-Type": "text/xml"}, b"<Error><Code>InternalError</Code></Error>")
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            data, headers = response.read(), dict(response.getheaders())
            if fault == "lost" or (fault == "cut" and len(data) > 1):
                counts[fault] += 1
                self.close_connection = True
                if fault == "lost":
                    return None
                headers = {name: value for name, value in headers.items() if name.lower() != "transfer-encoding"}
                return self.answer(
                    response.status, headers | {"Content-Length": str(len(data))}, data[: len(data) // 2]
                )
            return self.answer(response.status, headers, data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_one

        def answer(self, status, headers, data):
            self.send_response_only(status)
            names = {name.lower() for name in headers}
            for name, value in headers.items():
                self.send_header(name, value)
            if "content-length" not in names:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1], counts
    finally:
        server.shutdown()
        server.server_close()

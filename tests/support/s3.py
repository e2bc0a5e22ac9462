"""moto's S3 on loopback, behind a server that fails as stores do: errors, answers cut short, answers lost."""

import contextlib
import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from support.launch import free_port

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def moto(folder):
    """moto's server; its port."""
    port = free_port()
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with open(folder / "moto.log", "w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=os.environ | ENVIRONMENT)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request(
            "PUT", "/bucket", headers={"Authorization": "AWS4-HMAC-SHA256 Credential=x/x/us-east-1/s3/x"}
        )
        assert connection.getresponse().status == 200
        yield port
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def failing(port, share, seed=0):
    """A server before moto's that fails for a share of the requests; its port and {fault: how often}."""
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

"""As much of S3 as s3fs asks for, in memory, on loopback: whole objects, ranges, listings, and creation if absent.

Prints its port, then a line for each request.
"""

import hashlib
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 1000
objects: dict[str, tuple[bytes, str, float]] = {}  # "bucket/key": (data, ETag, time)
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_PUT(self):
        data, name = self._body(), self._name()
        if "/" not in name:
            return self._answer(200)  # a bucket
        made = data, f'"{hashlib.md5(data).hexdigest()}"', time.time()
        with lock:
            if self.headers.get("If-None-Match") == "*" and name in objects:
                # Stores other than Amazon's do not all say which condition it was.
                which = "" if "terse" in name else "<Condition>If-None-Match</Condition>"
                return self._fail(412, "PreconditionFailed", which)
            objects[name] = made
        return self._answer(200, {"ETag": made[1]})

    def do_GET(self):
        name, query = self._name(), parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        if "/" not in name:
            return self._listing(name, {key: values[0] for key, values in query.items()})
        if name not in objects:
            return self._fail(404, "NoSuchKey")
        data, etag, changed = objects[name]
        headers = {"ETag": etag, "Last-Modified": formatdate(changed, usegmt=True), "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
            return self._answer(206, headers, data[begin : end + 1])
        return self._answer(200, headers, data)

    def do_HEAD(self):
        return self._answer(200) if "/" not in self._name() else self.do_GET()

    def do_DELETE(self):
        with lock:
            objects.pop(self._name(), None)
        return self._answer(204)

    def _listing(self, bucket, query):
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        after, limit = query.get("continuation-token", ""), int(query.get("max-keys", PAGE))
        entries = {}
        for name in sorted(objects):
            key = name.removeprefix(f"{bucket}/")
            if name == key or not key.startswith(prefix):
                continue
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            if cut < 0:
                data, etag, changed = objects[name]
                when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(changed))
                facts = f"<LastModified>{when}</LastModified><ETag>{escape(etag)}</ETag><Size>{len(data)}</Size>"
                entries[key] = f"<Contents><Key>{escape(key)}</Key>{facts}</Contents>"
            else:
                entries[key[: cut + 1]] = f"<CommonPrefixes><Prefix>{escape(key[: cut + 1])}</Prefix></CommonPrefixes>"
        names = [name for name in sorted(entries) if name > after]
        shown = names[:limit]
        more = f"<NextContinuationToken>{escape(shown[-1])}</NextContinuationToken>" if len(names) > limit else ""
        texts = "".join(entries[name] for name in shown)
        counts = f"<KeyCount>{len(shown)}</KeyCount><IsTruncated>{str(bool(more)).lower()}</IsTruncated>"
        return self._xml(200, f"<ListBucketResult>{counts}{more}{texts}</ListBucketResult>")

    def _name(self):
        return unquote(urlsplit(self.path).path).strip("/")

    def _body(self):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return data
        whole = b""
        while data:
            size, _, data = data.partition(b"\r\n")
            length = int(size.partition(b";")[0], 16)
            if not length:
                break
            whole, data = whole + data[:length], data[length + 2 :]
        return whole

    def _fail(self, status, code, more=""):
        return self._xml(status, f"<Error><Code>{code}</Code><Message>{code}</Message>{more}</Error>")

    def _xml(self, status, text):
        return self._answer(status, {"Content-Type": "application/xml"}, f"<?xml version='1.0'?>{text}".encode())

    def _answer(self, status, headers=None, data=b""):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format, *args):
        print(format % args, flush=True)


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()

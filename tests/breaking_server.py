"""A real HTTP server on localhost for a folder of files, with ranges, that fails on command."""

import email.utils
import hashlib
import threading
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """`faults`: file name -> what the next answers with its content do, first to last; None is an answer without a fault.

    ("cut", n): the connection is closed after n bytes of the body. ("status", code). ("ignore range",). ("length", n): Content-Length
    lies. ("hang", n): nothing comes after n bytes, until `released`. ("change", bytes): the file has other bytes from now on.
    ("blind", bytes): the same, and ranges of it are given whatever If-Range says. ("refuse range",): 416. `asked`: the (method, name, Range, If-Range) of each request, in order.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.asked = folder, defaultdict(list), []
        self.released, self.etags, self.head = threading.Event(), True, True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def ranges(self, name: str) -> list[str | None]:
        return [wanted for method, asked, wanted, _ in self.asked if asked == name and method == "GET"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        if self.server.head:
            self.answer(body=False)
        else:
            self.fail(501)

    def do_GET(self) -> None:
        self.answer(body=True)

    def fail(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body: bool) -> None:
        path = self.server.folder / self.path.lstrip("/")
        wanted, unless = self.headers.get("Range"), self.headers.get("If-Range")
        self.server.asked.append((self.command, path.name, wanted, unless))
        if not path.is_file():
            self.fail(404)
            return
        faults = self.server.faults[path.name]
        kind, *values = (faults.pop(0) if body and faults else None) or ("none",)
        if kind == "status":
            self.fail(values[0])
            return
        if kind in ("change", "blind"):
            path.write_bytes(values[0])
        data = path.read_bytes()
        etag = f'"{hashlib.sha1(data).hexdigest()}"' if self.server.etags else None
        modified = email.utils.formatdate(path.stat().st_mtime, usegmt=True)
        begins = 0
        if wanted and kind != "ignore range" and (kind == "blind" or unless in (None, etag, modified)):
            begins = int(wanted.removeprefix("bytes=").rstrip("-"))
        if begins >= len(data) or (wanted and kind == "refuse range"):
            self.fail(416)
            return
        self.send_response(206 if begins else 200)
        if begins:
            self.send_header("Content-Range", f"bytes {begins}-{len(data) - 1}/{len(data)}")
        if etag:
            self.send_header("ETag", etag)
            self.send_header("Last-Modified", modified)
        rest = data[begins:]
        self.send_header("Content-Length", str(values[0] if kind == "length" else len(rest)))
        self.end_headers()
        if not body:
            return
        if kind in ("cut", "hang"):
            rest = rest[: values[0]]
        self.wfile.write(rest)
        self.wfile.flush()
        if kind == "hang":
            self.server.released.wait(60)
        if kind != "none":
            self.close_connection = True

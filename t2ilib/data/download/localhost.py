"""A folder as a server of its files, on this machine and for it alone, as long as a download takes.

For a data set that lies on a disk as its server has it, such as the small one that `t2ilib data shapes --layout coco` draws, or one that was
carried here: what is fetched goes the way of everything that is fetched, pieces, checksums and all. Gives ranges (RFC 9110, 14.2), which
Python's own handler does not, and lists nothing.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO


class Files(SimpleHTTPRequestHandler):
    """Whole files, and the rest of a file from a byte on, if it is still the one that was begun."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *told: object) -> None:
        pass

    def list_directory(self, path: str) -> None:
        self.send_error(404)

    def send_head(self) -> BinaryIO | None:
        """The file, at the byte that is asked for, behind its headers."""
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return None
        file = path.open("rb")
        about = os.fstat(file.fileno())
        etag = f'"{about.st_size:x}-{about.st_mtime_ns:x}"'
        asked, unless = self.headers.get("Range", ""), self.headers.get("If-Range")
        begin = asked.removeprefix("bytes=").removesuffix("-") if unless in (None, etag) else ""
        begin = int(begin) if begin.isdecimal() and int(begin) < about.st_size else 0
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{about.st_size - 1}/{about.st_size}")
        self.send_header("Content-Length", str(about.st_size - begin))
        self.send_header("Last-Modified", self.date_time_string(about.st_mtime))
        self.send_header("ETag", etag)
        self.end_headers()
        file.seek(begin)
        return file


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which the files of `folder` are, for as long as the scope lasts."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(folder.absolute()))) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()

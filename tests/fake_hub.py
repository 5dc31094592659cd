"""A Hub on this machine, as far as huggingface_hub asks it to make a repository and to take a commit of small files."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeHub:
    """`repositories`: name -> path -> content; `refuse`: (method, part of the path) -> status to answer once with."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.refuse: dict[tuple[str, str], int] = {}
        self.asked: list[tuple[str, str]] = []
        self.address = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict]:
        self.asked.append((method, path))
        for key, status in [*self.refuse.items()]:
            if key[0] == method and key[1] in path:
                del self.refuse[key]
                return status, {"error": "not today"}
        parts = path.partition("?")[0].strip("/").split("/")
        if path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}"
            self.repositories[name], self.private[name] = (
                {},
                bool(told.get("private") or told.get("visibility") == "private"),
            )
            return 200, {"url": f"{self.address}/{name}", "id": name, "name": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name = "/".join(parts[2:4])
        if parts[:2] != ["api", "models"] or name not in self.repositories:
            return 404, {"error": "Repository not found"}
        files = self.repositories[name]
        if method == "POST" and parts[4] == "preupload":
            wanted = json.loads(body)["files"]
            return 200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
        if method == "POST" and parts[4] == "commit":
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {
                "success": True,
                "commitOid": "0" * 40,
                "commitUrl": f"{self.address}/{name}/commit/{'0' * 40}",
                "hookOutput": "",
            }
        siblings = [{"rfilename": file} for file in files]
        return 200, {
            "id": name,
            "modelId": name,
            "private": self.private[name],
            "siblings": siblings,
            "sha": "0" * 40,
            "tags": [],
        }


@contextmanager
def serving() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, told = hub.answer(self.command, self.path, body)
            data = json.dumps(told).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_HEAD = reply

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()

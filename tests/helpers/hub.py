"""A local server that answers as the Hugging Face Hub does, for tests of weights by name."""

import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclasses.dataclass
class Repository:
    """A repository with one branch, `main`; its commit follows from its files."""

    files: dict[str, bytes]
    token: str = ""  # that a request must have
    gated: bool = False  # refuses requests without it with 403, not 401
    status: int = 0  # an HTTP error in answer to everything
    false_commit: str = ""  # that is reported
    cut: int = 0  # bytes after which the connection breaks, once per file
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)  # that are reported, instead of the files' own

    @property
    def commit(self) -> str:
        digests = [f"{name} {hashlib.sha256(data).hexdigest()}" for name, data in sorted(self.files.items())]
        return self.false_commit or hashlib.sha1("\n".join(digests).encode()).hexdigest()

    def size(self, name: str) -> int:
        return self.sizes.get(name, len(self.files[name]))


class Server(ThreadingHTTPServer):
    """Serves repositories by their ids; records all requests."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Repository]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.requests: list[str] = []  # 'GET /OWNER/NAME/resolve/main/config.json'
        self.ranges: list[str] = []
        self.tokens: set[str | None] = set()
        self.broken: set[str] = set()
        self.stalled = threading.Event()  # set once the first bytes of a weights file are sent
        self.stall = False  # sends half of each weights file, then nothing
        self.release = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        with suppress(ConnectionError):
            self.answer()

    def answer(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        self.server.tokens.add(self.headers.get("Authorization"))
        path = self.path.partition("?")[0]
        if stored := re.fullmatch(r"/cdn/(\w+/[\w.-]+)/(.+)", path):  # where weights are, as on the Hub
            return self.send_file(stored[2], self.server.repositories[stored[1]])
        asked = re.fullmatch(r"/api/models/(\w+/[\w.-]+)(?:/revision/([^/]+))?", path)
        asked = asked or re.fullmatch(r"/(\w+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
        repository = self.server.repositories.get(asked[1]) if asked else None
        if asked is None or repository is None:
            return self.refuse(401, "", "Invalid username or password.")  # as for private ones
        if repository.status:
            return self.refuse(repository.status)
        if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
            if repository.gated:
                return self.refuse(403, "GatedRepo")
            wrong = self.headers.get("Authorization") is not None
            return self.refuse(401, "", "Invalid credentials in Authorization header" if wrong else "")
        if asked[2] not in (None, "main", repository.commit):
            return self.refuse(404, "RevisionNotFound")
        if path.startswith("/api/"):
            return self.describe(asked[1], repository)
        if asked[3].endswith((".safetensors", ".bin")) and asked[3] in repository.files:
            return self.redirect(asked[1], asked[3], repository)
        self.send_file(asked[3], repository)

    def redirect(self, name: str, file: str, repository: Repository) -> None:
        self.send_response(302)
        self.send_header("Location", f"{self.server.endpoint}/cdn/{name}/{file}")
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("X-Linked-Etag", f'"{hashlib.sha256(repository.files[file]).hexdigest()}"')
        self.send_header("X-Linked-Size", str(repository.size(file)))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def describe(self, name: str, repository: Repository) -> None:
        files = [{"rfilename": file, "size": repository.size(file)} for file in repository.files]
        info: dict[str, Any] = {"_id": "0", "id": name, "modelId": name, "sha": repository.commit, "siblings": files}
        body = json.dumps(info).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, name: str, repository: Repository) -> None:
        data = repository.files.get(name)
        if data is None:
            return self.refuse(404, "EntryNotFound")
        self.server.ranges.append(self.headers.get("Range", ""))
        start = 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(asked[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(repository.size(name) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        is_weights = name.endswith((".safetensors", ".bin"))
        if repository.cut and is_weights and name not in self.server.broken:
            self.server.broken.add(name)
            self.wfile.write(data[: repository.cut])
            self.close_connection = True
            return
        if self.server.stall and is_weights:
            self.wfile.write(data[: len(data) // 2])
            self.server.stalled.set()
            self.server.release.wait(30)
        self.wfile.write(data[start:])
        if len(data) != repository.size(name):
            self.close_connection = True


@contextmanager
def serving(repositories: dict[str, Repository]) -> Iterator[Server]:
    with Server(repositories) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        try:
            yield server
        finally:
            server.release.set()
            server.shutdown()
            thread.join()

"""Servers on 127.0.0.1: a Hugging Face hub that speaks enough of the protocol for huggingface_hub to download for real,
and a plain web server that can misbehave."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_args: object) -> None:
        """Clients that hang up are what some tests are about."""


@dataclass
class Repository:
    """Files of one commit. ``gated`` refuses them; names in ``truncated`` break off after half of their bytes."""

    files: dict[str, bytes]
    commit: str
    branches: set[str] = field(default_factory=lambda: {"main"})
    gated: bool = False
    forbidden: bool = False
    truncated: set[str] = field(default_factory=set)


class HubServer:
    """``with HubServer() as hub: hub.add("owner/name", {"a.txt": b"…"})``; clients need ``HF_ENDPOINT=hub.url``.

    ``hub.requests`` is the list of (method, path) served so far.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repo_id: str, files: dict[str, bytes], **options) -> Repository:
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repositories[repo_id] = Repository(files, commit, **options)
        return self.repositories[repo_id]

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    stop = __exit__

    def _handler(hub):  # noqa: N805 - the request handler below has its own self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer()

            def do_GET(self) -> None:
                self._answer()

            def _answer(self) -> None:
                hub.requests.append((self.command, self.path))
                parts = [unquote(part) for part in urlsplit(self.path).path.split("/") if part]
                if parts[:2] == ["api", "models"] and len(parts) >= 4:
                    self._list(f"{parts[2]}/{parts[3]}")
                elif len(parts) >= 5 and parts[2] == "resolve":
                    self._file(f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]))
                else:
                    self._refuse(404, "EntryNotFound")

            def _list(self, repo_id: str) -> None:
                repository = hub.repositories.get(repo_id)
                if repository is None:
                    return self._refuse(404, "RepoNotFound")
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in repository.files.items()
                ]
                return self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

            def _file(self, repo_id: str, revision: str, name: str) -> None:
                repository = hub.repositories.get(repo_id)
                if repository is None:  # what the hub answers to the anonymous, so as not to betray private ones
                    return self._refuse(401, "RepoNotFound")
                if repository.gated:
                    return self._refuse(401, "GatedRepo")
                if repository.forbidden:
                    return self._refuse(403, None)
                if revision not in (*repository.branches, repository.commit):
                    return self._refuse(404, "RevisionNotFound")
                if name not in repository.files:
                    return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": repository.commit})
                content = repository.files[name]
                headers = {"X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
                if name.endswith((".pth", ".safetensors", ".zip")):  # large files: named by their SHA-256
                    headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
                    headers["X-Linked-Size"] = str(len(content))
                headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
                return self._send(200, content, headers, half=name in repository.truncated)

            def _refuse(self, status: int, code: str | None, headers: dict[str, str] | None = None) -> None:
                self._send(status, b"", {**({"X-Error-Code": code} if code else {}), **(headers or {})})

            def _send(self, status: int, content: bytes, headers: dict[str, str], half: bool = False) -> None:
                start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
                if start and status == 200:
                    status = 206
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(content) - start)}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content[start : len(content) // 2 if half else None])
                    self.close_connection = half

        return Handler


@dataclass
class Page:
    """What a web server has at one path.

    Attributes:
        content: its bytes.
        status: of the answer.
        headers: more of them, or others than usual.
        breaks: for each request in turn: after how many bytes of its answer the connection breaks.
        says_length: whether Content-Length is sent.
        resumable: whether ranges are served.
    """

    content: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    breaks: list[int] = field(default_factory=list)
    says_length: bool = True
    resumable: bool = True


class WebServer:
    """``with WebServer() as web: web.pages["/x.zip"] = Page(b"…")``, then ``web.url + "/x.zip"``.

    ``web.requests`` is the list of (path, Range header) asked for so far.
    """

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.requests: list[tuple[str, str | None]] = []
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> WebServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    stop = __exit__

    def _handler(web):  # noqa: N805 - the request handler below has its own self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_args: object) -> None:
                pass

            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                web.requests.append((self.path, wanted))
                page = web.pages.get(urlsplit(self.path).path, Page(status=404))
                headers = {"ETag": f'"{hashlib.sha1(page.content).hexdigest()}"', **page.headers}
                content, status = page.content, page.status
                if wanted and page.resumable and self.headers.get("If-Range") == headers["ETag"]:
                    start = int(wanted.removeprefix("bytes=").partition("-")[0])
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                    content, status = content[start:], 206
                if page.says_length:
                    headers["Content-Length"] = str(len(content))
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()
                broken = page.breaks.pop(0) if page.breaks else None
                self.wfile.write(content[:broken])
                self.close_connection = broken is not None or not page.says_length

        return Handler

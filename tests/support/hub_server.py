"""Servers on 127.0.0.1: a Hugging Face hub that speaks enough of the protocol for huggingface_hub to download and upload
for real, and a plain web server that can misbehave."""

from __future__ import annotations

import base64
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
    licence: str | None = None


class HubServer:
    """``with HubServer() as hub: hub.add("owner/name", {"a.txt": b"…"})``; clients need ``HF_ENDPOINT=hub.url``.

    ``hub.requests`` is the list of (method, path) served so far. Uploads go the way of Git LFS (clients need
    ``HF_HUB_DISABLE_XET``): files of weights as objects, the others inside the commit. ``hub.token`` is what a client must
    present to write; ``hub.breaks`` names the steps (``create``, ``preupload``, ``batch``, ``object``, ``commit``) that
    fail, with the HTTP status of each.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.objects: dict[str, bytes] = {}
        self.private: set[str] = set()
        self.token: str | None = None
        self.breaks: dict[str, int] = {}
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

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.requests.append((self.command, self.path))
                parts = [unquote(part) for part in urlsplit(self.path).path.split("/") if part]
                if parts == ["api", "repos", "create"]:
                    self._writing("create", lambda: self._create(json.loads(body)))
                elif parts == ["api", "validate-yaml"]:
                    self._send_json({"errors": [], "warnings": []})
                elif parts[:2] == ["api", "models"] and parts[4:5] == ["preupload"]:
                    self._writing("preupload", lambda: self._preupload(json.loads(body)))
                elif parts[:2] == ["api", "models"] and parts[4:5] == ["commit"]:
                    lines = [json.loads(line) for line in body.splitlines()]
                    self._writing("commit", lambda: self._commit(f"{parts[2]}/{parts[3]}", lines))
                elif parts[2:] == ["info", "lfs", "objects", "batch"]:
                    self._writing("batch", lambda: self._batch(json.loads(body)))
                else:
                    self._refuse(404, "EntryNotFound")

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.requests.append((self.command, self.path))
                if "object" in hub.breaks:
                    return self._refuse(hub.breaks["object"], None)
                digest = self.path.rpartition("/")[2]
                if hashlib.sha256(body).hexdigest() != digest:
                    return self._refuse(400, None)
                hub.objects[digest] = body
                return self._send(200, b"", {})

            def _writing(self, step: str, answer) -> None:
                if step in hub.breaks:
                    return self._refuse(hub.breaks[step], None)
                if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                    return self._refuse(401, None)
                return answer()

            def _create(self, wish: dict) -> None:
                repo_id = f"{wish.get('organization') or 'me'}/{wish['name']}"
                if repo_id in hub.repositories:
                    self._send_json({"url": f"{hub.url}/{repo_id}", "error": "exists"}, status=409)
                else:
                    hub.add(repo_id, {})
                    if wish.get("private") or wish.get("visibility") == "private":
                        hub.private.add(repo_id)
                    self._send_json({"url": f"{hub.url}/{repo_id}", "name": repo_id})

            def _preupload(self, wish: dict) -> None:
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith((".pth", ".safetensors", ".zip")) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in wish["files"]
                ]
                self._send_json({"files": modes})

            def _batch(self, wish: dict) -> None:
                objects = [
                    entry  # the hub has it already: no action
                    if entry["oid"] in hub.objects
                    else {**entry, "actions": {"upload": {"href": f"{hub.url}/lfs/{entry['oid']}", "header": {}}}}
                    for entry in wish["objects"]
                ]
                self._send_json({"transfer": "basic", "objects": objects})

            def _commit(self, repo_id: str, lines: list[dict]) -> None:
                if repo_id not in hub.repositories:
                    return self._refuse(404, "RepoNotFound")
                files = dict(hub.repositories[repo_id].files)
                for line in lines:
                    value = line["value"]
                    if line["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        if value["oid"] not in hub.objects:
                            return self._refuse(400, None)
                        files[value["path"]] = hub.objects[value["oid"]]
                    elif line["key"] == "deletedFile":
                        del files[value["path"]]
                commit = hub.add(repo_id, files).commit
                # huggingface_hub up to 0.27 or so reads no address but that of where it was imported for.
                address = f"https://huggingface.co/{repo_id}/commit/{commit}"
                return self._send_json({"success": True, "commitOid": commit, "commitUrl": address})

            def _send_json(self, content: dict, status: int = 200) -> None:
                self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

            def _answer(self) -> None:
                hub.requests.append((self.command, self.path))
                parts = [unquote(part) for part in urlsplit(self.path).path.split("/") if part]
                if parts[:2] == ["api", "models"] and parts[4:] == ["refs"]:
                    self._refs(f"{parts[2]}/{parts[3]}")
                elif parts[:2] == ["api", "models"] and len(parts) >= 4:
                    self._list(f"{parts[2]}/{parts[3]}", whole="tree" not in parts)
                elif len(parts) >= 5 and parts[2] == "resolve":
                    self._file(f"{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:]))
                else:
                    self._refuse(404, "EntryNotFound")

            def _refs(self, repo_id: str) -> None:
                repository = hub.repositories.get(repo_id)
                if repository is None:
                    return self._refuse(404, "RepoNotFound")
                branches = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": repository.commit}
                    for name in sorted(repository.branches)
                ]
                return self._send_json({"branches": branches, "tags": [], "converts": []})

            def _list(self, repo_id: str, whole: bool) -> None:
                """The list of its files, or all that the hub says of a repository."""
                repository = hub.repositories.get(repo_id)
                if repository is None:
                    return self._refuse(404, "RepoNotFound")
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in repository.files.items()
                ]
                siblings = [{"rfilename": entry["path"], "size": entry["size"]} for entry in entries]
                card = {"license": repository.licence} if repository.licence else {}
                told = {"id": repo_id, "sha": repository.commit, "siblings": siblings, "cardData": card}
                answer = json.dumps(told if whole else entries)
                return self._send(200, answer.encode(), {"Content-Type": "application/json"})

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
                if self.command != "HEAD":
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

            def do_HEAD(self) -> None:
                self.do_GET()

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
                if self.command != "HEAD":
                    self.wfile.write(content[:broken])
                self.close_connection = broken is not None or not page.says_length

        return Handler

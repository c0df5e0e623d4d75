"""Files at plain web addresses, such as the assets of a GitHub release. With ``hub.py`` the only code on the network.

Each address has a folder of its own below the downloads folder: the file, and ``download.json`` with its digest, written
last. Without that record a file is taken for a leftover and fetched again; with it, it is never asked for again.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import re
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urldefrag, urljoin, urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from nnssl_adapt.errors import (
    DigestMismatch,
    SourceAccessDenied,
    SourceError,
    SourceNotFound,
    SourceUnavailable,
)
from nnssl_adapt.files import atomic_path
from nnssl_adapt.text import size_text
from nnssl_adapt.weights.sources.digests import Record, file_digest
from nnssl_adapt.weights.sources.hub import offline

logger = logging.getLogger(__name__)

RECORD_NAME = "download.json"
_TIMEOUT = 30.0  # seconds without a byte
_ATTEMPTS = 4  # a transfer that breaks is taken up where it broke
_BLOCK = 1 << 20  # bytes
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_URL_CHARACTERS = "%/:=&?~+!$,;'@()*[]"  # already as they should be; the rest is quoted
_RELEASE_ASSET = "https://github.com/OWNER/NAME/releases/download/TAG/FILE.zip"


@dataclass(frozen=True)
class Address:
    """A web address and the digest that its ``#sha256=`` demands, if any."""

    url: str
    sha256: str | None

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises SourceError for other schemes, plain http to other machines, and other ``#`` parts."""
        url, fragment = urldefrag(text)
        _check_scheme(url)
        if not fragment:
            return cls(url, None)
        key, _, digest = fragment.partition("=")
        if key != "sha256" or not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            raise SourceError(f"{text}: what follows # must be sha256= and 64 hexadecimal digits")
        return cls(url, digest.lower())

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """The last part of its path, as a file name."""
        return safe_name(unquote(urlsplit(self.url).path))


def safe_name(name: str) -> str:
    """A plain file name from what a server or an address says: no folders, nothing hidden, no odd characters."""
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.+-]", "_", last, flags=re.ASCII).lstrip(".-")[-120:] or "download"


def _check_scheme(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK):
        return
    if parts.scheme == "http":
        raise SourceError(f"{url}: files sent over http can be changed on the way; give its https address")
    raise SourceError(f"{url} is neither an https address nor a Hugging Face one")


def download(address: Address, folder: Path, local_files_only: bool = False) -> tuple[Path, str]:
    """The file at an address, from below ``folder`` if it was fetched before.

    Returns its path and its SHA-256, checked against the one recorded when it was fetched.

    Raises:
        DigestMismatch: it is not what was recorded, or not what the address demands (then nothing is kept).
        SourceNotFound, SourceAccessDenied, SourceUnavailable: the server says so, or the network.
        SourceError: what is there is a web page.
    """
    kept = folder / "web" / hashlib.sha256(address.url.encode()).hexdigest()[:24]
    record = Record.load(kept / RECORD_NAME)
    if record is not None:
        return _from_record(record, address)
    if local_files_only or offline():
        why = "HF_HUB_OFFLINE is set" if offline() else "local_files_only"
        raise SourceUnavailable(
            f"{address} was not downloaded before, and the network may not be used ({why}): "
            "run 'nnssl-adapt fetch ADDRESS --to FOLDER' where there is internet and set nnssl_pretrained_models=FOLDER "
            "here, or give a local path"
        )
    return _fetch(address, kept)


def _from_record(record: Record, address: Address) -> tuple[Path, str]:
    path = record.path.parent / next(iter(record.files))
    fix = f"delete {record.path.parent} and run the same command again"
    digest = record.check(path, fix) if path.is_file() else ""
    if not digest:
        raise SourceNotFound(f"{path}, the download of {address}, is gone: {fix}")
    if address.sha256 not in (None, digest):
        raise DigestMismatch(
            f"{path}, downloaded earlier from {address}, has sha256 {digest}, and {address.sha256} was requested: "
            f"correct what follows #, or {fix}"
        )
    return path, digest


def _fetch(address: Address, kept: Path) -> tuple[Path, str]:
    transfer = _Transfer(address)
    with transfer.open() as response:
        name = transfer.file_name(response.headers)
        logger.info("downloading %s (%s) to %s", address, _megabytes(transfer.size), kept)
        path = kept / name
        with atomic_path(path) as temporary:
            with open(temporary, "wb") as stream:
                digest = transfer.receive(response, stream)
            if address.sha256 not in (None, digest):
                raise DigestMismatch(
                    f"{address} has sha256 {digest}, and {address.sha256} was requested: nothing was kept. The file was "
                    "changed after the digest was published, or the digest is another file's"
                )
    Record(kept / RECORD_NAME, {name: digest}, {"url": address.url, "bytes": path.stat().st_size}).save()
    return path, file_digest(path)  # of what the disk has, not of what we meant to write


class _Transfer:
    """The download of one file; resumes where the connection broke, if the server can."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.size: int | None = None
        self.validator: str | None = None  # names this very version, so that two are never joined

    def open(self, start: int = 0) -> Any:
        headers = {"User-Agent": "nnssl-adapt", "Accept-Encoding": "identity"}
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": str(self.validator)}
        try:
            response = _opener().open(
                Request(quote(self.address.url, safe=_URL_CHARACTERS), headers=headers), timeout=_TIMEOUT
            )
        except HTTPError as error:
            with error:
                raise _refusal(error, self.address) from error
        except (URLError, OSError, http.client.HTTPException) as error:
            raise SourceUnavailable(f"{self.address} can't be reached ({_reason(error)})") from error
        if not start:
            self._look_at(response)
        return response

    def _look_at(self, response: Any) -> None:
        headers: Message = response.headers
        if headers.get_content_type() in ("text/html", "application/xhtml+xml"):
            raise SourceError(
                f"{self.address} is a web page, not a file: give the address of the file itself, like {_RELEASE_ASSET}"
            )
        length = headers.get("Content-Length") or ""
        self.size = int(length) if length.isdigit() else None
        if self.size is None and headers.get("Transfer-Encoding") is None and self.address.sha256 is None:
            raise SourceError(
                f"{self.address}: the server does not say how long the file is, so a broken download can't be detected: "
                "add #sha256=… to the address, or download it yourself"
            )
        tag = headers.get("ETag")
        self.validator = tag if tag and not tag.startswith("W/") else None

    def file_name(self, headers: Message) -> str:
        """As the server calls it, else by the address. Release assets are redirected to addresses without a name."""
        name = safe_name(headers.get_filename() or self.address.name)
        return f"_{name}" if name == RECORD_NAME else name

    def receive(self, response: Any, stream: IO[bytes]) -> str:
        """Write the whole file to ``stream`` and return its digest. Raises SourceUnavailable when it breaks off."""
        digest, received = hashlib.sha256(), 0
        for attempt in range(1, _ATTEMPTS + 1):
            trouble = None
            while block := self._read(response):
                if isinstance(block, str):
                    trouble = block
                    break
                stream.write(block)
                digest.update(block)
                received += len(block)
            if trouble is None and self.size in (None, received):
                return digest.hexdigest()
            trouble = trouble or "the connection was closed"
            if attempt == _ATTEMPTS or not self.validator or not 0 < received < (self.size or received + 1):
                break
            logger.info("%s: %s after %s, going on", self.address, trouble, _megabytes(received))
            response.close()
            response = self.open(received)
            if not _goes_on_at(received, response):  # another version by now, or a server that can't
                break
        response.close()
        raise SourceUnavailable(
            f"the download of {self.address} broke off after {received} of {self.size or 'an unknown number of'} bytes "
            f"({trouble}); nothing partial is kept: run the same command again"
        )

    def _read(self, response: Any) -> bytes | str:
        """A block, nothing at the end, or what went wrong. Apart from the writing, whose errors are the disk's."""
        try:
            return bytes(response.read(_BLOCK))
        except (OSError, http.client.HTTPException) as error:
            return _reason(error)


def _goes_on_at(start: int, response: Any) -> bool:
    return response.status == 206 and str(response.headers.get("Content-Range")).startswith(f"bytes {start}-")


class SafeRedirects(HTTPRedirectHandler):
    """Follows redirects, but never to plain http or another scheme."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        target = urljoin(req.full_url, newurl)
        try:
            _check_scheme(target)
            if urlsplit(req.full_url).scheme == "https" and urlsplit(target).scheme != "https":
                raise SourceError(target)
        except SourceError:
            raise SourceError(f"{req.full_url} redirects to {target}, which is not https: refused") from None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> OpenerDirector:
    return build_opener(SafeRedirects)


def _refusal(error: HTTPError, address: Address) -> SourceError:
    if 300 <= error.code < 400:  # another scheme, or in circles
        return SourceError(f"{address} redirects to where it can't be followed: refused ({_reason(error)})")
    if error.code in (401, 403):
        return SourceAccessDenied(
            f"{address} may not be read (HTTP {error.code}): download it where you are logged in, and give the local path"
        )
    if error.code in (404, 410):
        return SourceNotFound(
            f"there is no {address} (HTTP {error.code}): check the address, the tag and the file's name"
        )
    return SourceUnavailable(f"{address}: the server answered HTTP {error.code}: try again later")


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", None) or error
    return " ".join(str(inner).split()) or type(inner).__name__


def _megabytes(size: int | None) -> str:
    return "unknown size" if size is None else size_text(size)

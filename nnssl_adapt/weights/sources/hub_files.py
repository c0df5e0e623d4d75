"""Which repository and files of the Hugging Face hub are meant, and getting them all at one commit."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from nnssl_adapt.errors import DigestMismatch, SourceNotFound
from nnssl_adapt.weights.sources.digests import file_digest
from nnssl_adapt.weights.sources.hub import Hub, Missing, NotCached, commit_of, endpoint
from nnssl_adapt.weights.sources.listing import (
    ARCHIVE_SUFFIX,
    SIDECAR_NAME,
    WEIGHT_NAMES,
    WEIGHT_SUFFIXES,
    Chosen,
    choose_files,
    is_weight_name,
)

_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class HubAddress:
    """A repository, and the revision and file that its address names, if any.

    ``tree`` is what follows ``tree/``, ``blob/`` or ``resolve/`` in an address, as a whole: a branch may have slashes in its
    name, so that only the hub knows where it ends. ``revision`` and ``filename`` are what it is without any.
    """

    repo_id: str
    revision: str | None = None
    filename: str | None = None
    tree: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubAddress | None:
        """Read ``[hf://]owner/name[@revision]`` or a hub address; None when the text is neither."""
        if text.startswith("hf://"):
            return cls._from_url(f"https://{_HUB_HOSTS[0]}/{text.removeprefix('hf://').removeprefix('models/')}")
        if text.startswith(tuple(f"{host}/" for host in _HUB_HOSTS)):
            text = f"https://{text}"
        if "://" in text:
            return cls._from_url(text)
        repo_id, at, revision = text.partition("@")
        if text.lower().endswith((*WEIGHT_SUFFIXES, ARCHIVE_SUFFIX)) or not _REPO_ID.fullmatch(repo_id):
            return None
        return None if at and not revision else cls(repo_id, revision or None)

    @classmethod
    def _from_url(cls, text: str) -> HubAddress | None:
        parts = [unquote(part) for part in urlsplit(text).path.split("/") if part]
        if not is_hub_url(text) or len(parts) < 2:
            return None
        name, at, revision = parts[1].partition("@")
        repo_id, rest = f"{parts[0]}/{name}", parts[2:]
        if not _REPO_ID.fullmatch(repo_id) or (at and not revision):
            return None
        if at and rest:  # hf://owner/name@revision/folder/file
            return cls(repo_id, revision, "/".join(rest), "/".join((revision, *rest)))
        if not rest:
            return cls(repo_id, revision or None)
        if len(rest) == 2 and rest[0] == "tree":
            return cls(repo_id, rest[1])
        if len(rest) >= 3 and rest[0] in ("tree", "blob", "resolve"):
            return cls(repo_id, rest[1], "/".join(rest[2:]), "/".join(rest[1:]))
        return None

    def with_branch(self, hub: Hub) -> HubAddress:
        """The address with the hub's branch or tag that its ``tree`` begins with, where one with slashes does."""
        if self.tree is None:
            return self
        longest = max(
            (name for name in hub.branches() if f"{self.tree}/".startswith(f"{name}/")), key=len, default=None
        )
        if longest is None or longest == self.revision:
            return self
        return replace(self, revision=longest, filename=self.tree[len(longest) + 1 :] or None, tree=None)


def is_hub_url(text: str) -> bool:
    url = urlsplit(text)
    return url.scheme in ("http", "https") and url.netloc in {*_HUB_HOSTS, urlsplit(endpoint() or "").netloc} - {""}


def fetch_files(hub: Hub, filename: str | None, fold: str | None) -> tuple[Path, Chosen]:
    """Fetch the plan, then the weights of the same commit.

    Returns the folder of the commit in the hub's cache, and what was chosen of it.

    Raises:
        SourceNotFound: nothing in the repository fits, or several files do; the message lists them.
        SourceError: see :mod:`nnssl_adapt.errors`.
    """
    sidecar = None
    try:
        path = hub.fetch(SIDECAR_NAME)
        sidecar, hub = SIDECAR_NAME, replace(hub, revision=commit_of(path) or hub.revision)
    except Missing:
        pass
    except NotCached:
        # Either the hub is out of reach, or this is an offline machine whose repository has no sidecar. Only the cache
        # can help, and asking the hub again could pair weights with a plan that was merely not reachable.
        hub = replace(hub, local_files_only=True)
    if fold is None and "/" not in (filename or ""):
        for name in (filename,) if filename else WEIGHT_NAMES:
            found = _fetch_or_none(hub, name)
            if found is not None:
                return found.parent, Chosen((name,), sidecar)
    chosen = _choose(hub, filename, fold)
    for name in chosen.names:
        found = _fetch_or_none(hub, name)
        if found is None:
            raise hub.unavailable(name)
        hub = replace(hub, revision=commit_of(found) or hub.revision)
        root = found.parents[name.count("/")]
    return root, chosen


def _fetch_or_none(hub: Hub, name: str) -> Path | None:
    """The file, None if there is no such file (without the network: in the cache)."""
    try:
        return hub.fetch(name)
    except Missing:
        return None
    except NotCached:
        if hub.local_files_only:
            return None
        raise hub.unavailable(name) from None


def _choose(hub: Hub, filename: str | None, fold: str | None) -> Chosen:
    wanted = filename or WEIGHT_NAMES[0]
    try:
        names = hub.list_files()
    except (Missing, NotCached):
        raise hub.unavailable(wanted) from None
    try:
        return choose_files(names, str(hub), filename, fold)
    except SourceNotFound:
        if hub.local_files_only and (filename or fold or not any(map(is_weight_name, names))):
            raise hub.unavailable(wanted) from None
        raise


def verified_digest(path: Path, hub: Hub) -> str:
    """SHA-256 of a fetched file, checked against the name that the hub's cache gives to large files."""
    digest = file_digest(path)
    recorded = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", recorded) and recorded != digest:
        raise DigestMismatch(
            f"{path.name} of {hub} in the cache is damaged (sha256 {digest[:12]}…, expected {recorded[:12]}…): "
            f"delete {path.resolve()} and run the same command again"
        )
    return digest

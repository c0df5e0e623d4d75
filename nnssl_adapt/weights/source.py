"""Where pre-trained weights come from: a file, a folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from nnssl_adapt.errors import DigestMismatch, SourceError, SourceNotFound
from nnssl_adapt.files import sha256_of
from nnssl_adapt.paths import pretrained_models_folder
from nnssl_adapt.weights.adaptation_plan import SIDECAR_NAME
from nnssl_adapt.weights.hub import Hub, Missing, NotCached, commit_of, endpoint

logger = logging.getLogger(__name__)

WEIGHT_NAMES = ("checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_latest.pth")
"""What nnssl calls its checkpoints, the one to prefer first."""

_SAFETENSORS_NAMES = ("checkpoint_final.safetensors", "model.safetensors")
_WEIGHT_SUFFIXES = (".pth", ".pt", ".safetensors")
_HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Origin:
    """What a set of weights is, not where it happens to lie.

    Attributes:
        source: as the user typed it.
        kind: ``file``, ``folder``, ``model_folder``, ``zip``, ``url`` or ``huggingface``.
        repo_id: ``owner/name`` on the hub, else None.
        revision: the commit hash that was downloaded, else None.
        filename: the weight file's name.
        sha256: of the weight file's bytes; of the joined digests where several folds are averaged.
        fold: of a trained model folder: the fold taken (``0``, ``all``, …) or ``mean``; else None.
    """

    source: str
    kind: str
    repo_id: str | None
    revision: str | None
    filename: str
    sha256: str
    fold: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.repo_id is None:
            return self.source
        return f"{self.repo_id}@{self.revision[:12]}" if self.revision else self.repo_id


@dataclass(frozen=True)
class ResolvedSource:
    """Files on this machine.

    Attributes:
        weights: the weight file; of several folds the first.
        sidecar: the adaptation plan beside it, None when there is none.
        origin: what they are.
        model_folder: the trained nnU-Net model folder (plans.json, dataset.json) that the weights lie in, or None.
        other_folds: weight files of further folds, to be averaged with ``weights``.
    """

    weights: Path
    sidecar: Path | None
    origin: Origin
    model_folder: Path | None = None
    other_folds: tuple[Path, ...] = ()


def resolve_source(
    source: str | Path,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    filename: str | None = None,
    fold: str | None = None,
) -> ResolvedSource:
    """Find weights, downloading them if need be.

    Args:
        source: a ``.pth`` or ``.safetensors`` file, a folder with one, a hub id ``owner/name`` or ``owner/name@revision``,
            or a hub address ``https://huggingface.co/owner/name[/tree/REVISION]``. An existing path wins; then the same
            name below ``$nnssl_pretrained_models``; then the hub's cache and the hub.
        revision: branch, tag or commit on the hub (default: its main branch).
        cache_dir: the hub's cache, if not the usual one.
        local_files_only: never use the network (as does ``HF_HUB_OFFLINE=1``).
        filename: the weight file in the folder, archive or repository, if not one of nnssl's names.
        fold: of a trained model folder: which fold, or ``mean`` for the average of all.

    Raises:
        SourceNotFound: no such path, repository, revision or file.
        SourceAccessDenied: the repository is gated or private.
        SourceUnavailable: the hub can't be reached or the transfer broke off, and nothing is cached.
        DigestMismatch: the cached file is not what the hub says it is.
    """
    text = str(source).strip()
    if not text:
        raise SourceNotFound("no source given: name a file, a folder or a Hugging Face id (owner/name)")
    local = _local_path(text, revision)
    if local is not None:
        return _resolve_local(text, local, filename)
    address = _hub_address(text)
    if address is None:
        raise SourceNotFound(_not_found_message(text))
    repo_id, named_revision, named_file = address
    if revision and named_revision and revision != named_revision:
        raise SourceError(f"two revisions asked for: {named_revision!r} in {text!r} and {revision!r}; give one")
    hub = Hub(repo_id, revision or named_revision, cache_dir, local_files_only)
    return _resolve_hub(text, hub, filename or named_file)


# -- on this machine -------------------------------------------------------------------------------------------------


def _local_path(text: str, revision: str | None) -> Path | None:
    """The existing file or folder that is meant, or None when the text can only mean the hub."""
    if "://" in text:
        return None
    path = Path(text).expanduser()
    if path.exists():
        if revision:
            raise SourceError(f"{text} is on this machine and has no revision {revision!r}: leave the revision out")
        return path
    models = pretrained_models_folder()
    if models is None or path.is_absolute():
        return None
    name = f"{text}@{revision}" if revision else text
    candidates = [models / name, models / Path(name).name]
    return next((candidate for candidate in candidates if candidate.exists()), None)


def _resolve_local(text: str, path: Path, filename: str | None) -> ResolvedSource:
    kind = "folder" if path.is_dir() else "file"
    weights = _weights_in_folder(path, filename) if kind == "folder" else path
    sidecar = weights.parent / SIDECAR_NAME
    origin = Origin(text, kind, None, None, weights.name, _digest(weights))
    return ResolvedSource(weights, sidecar if sidecar.is_file() else None, origin)


def _digest(weights: Path) -> str:
    try:
        return sha256_of(weights)
    except OSError as error:
        raise SourceNotFound(f"can't read {weights}: {error.strerror or error}") from error


def _weights_in_folder(folder: Path, filename: str | None) -> Path:
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    chosen = _choose_weights(names, filename)
    if chosen is None:
        wanted = filename or f"{WEIGHT_NAMES[0]} (or _best, _latest, or one .safetensors)"
        raise SourceNotFound(f"{folder} has no {wanted}; it holds {_listing(names)}")
    return folder / chosen


def _choose_weights(names: list[str], filename: str | None) -> str | None:
    """The weight file among these names: the one asked for, nnssl's, or the only one there is."""
    if filename is not None:
        return filename if filename in names else None
    for name in (*WEIGHT_NAMES, *_SAFETENSORS_NAMES):
        if name in names:
            return name
    for suffix in (".safetensors", ".pth", ".pt"):
        matches = [name for name in names if name.endswith(suffix)]
        if len(matches) == 1:
            return matches[0]
    return None


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:12]) or "nothing"
    return f"{shown}, … ({len(names)} files)" if len(names) > 12 else shown


def _not_found_message(text: str) -> str:
    if "://" in text:
        return f"{text} is no Hugging Face address (https://huggingface.co/owner/name[/tree/REVISION])"
    below = pretrained_models_folder()
    searched = f"the working folder and nnssl_pretrained_models={below}" if below else "the working folder"
    return f"no file or folder {text!r} (looked in {searched}), and it is no Hugging Face id (owner/name)"


# -- on the hub ------------------------------------------------------------------------------------------------------


def _hub_address(text: str) -> tuple[str, str | None, str | None] | None:
    """(repo id, revision, file) of a hub id or address, or None when the text is neither."""
    if text.startswith(tuple(f"{host}/" for host in _HUB_HOSTS)):
        text = f"https://{text}"
    if "://" in text:
        return _from_url(text)
    repo_id, at, revision = text.partition("@")
    if text.endswith(_WEIGHT_SUFFIXES) or not _REPO_ID.fullmatch(repo_id) or (at and not revision):
        return None
    return repo_id, revision or None, None


def _from_url(text: str) -> tuple[str, str | None, str | None] | None:
    url = urlsplit(text)
    hosts = {*_HUB_HOSTS, urlsplit(endpoint() or "").netloc}
    parts = [unquote(part) for part in url.path.split("/") if part]
    if url.scheme not in ("http", "https") or url.netloc not in hosts or len(parts) < 2:
        return None
    name, at, revision = parts[1].partition("@")
    repo_id, rest = f"{parts[0]}/{name}", parts[2:]
    if not _REPO_ID.fullmatch(repo_id) or (at and (rest or not revision)):
        return None
    if not rest:
        return repo_id, revision or None, None
    if len(rest) == 2 and rest[0] == "tree":
        return repo_id, rest[1], None
    if len(rest) >= 3 and rest[0] in ("blob", "resolve"):
        return repo_id, rest[1], "/".join(rest[2:])
    return None


def _resolve_hub(text: str, hub: Hub, filename: str | None) -> ResolvedSource:
    """Fetch the plan, then the weights of the same commit."""
    folder = filename.rpartition("/")[0] if filename else ""
    try:
        sidecar: Path | None = hub.fetch(f"{folder}/{SIDECAR_NAME}" if folder else SIDECAR_NAME)
    except Missing:
        sidecar = None
    except NotCached:
        # Either the hub is out of reach, or this is an offline machine whose repository has no sidecar. Only the cache
        # can help, and asking the hub again could pair weights with a plan that was merely not reachable.
        sidecar, hub = None, replace(hub, local_files_only=True)
    if sidecar is not None:
        hub = replace(hub, revision=commit_of(sidecar) or hub.revision)
    weights = _fetch_weights(hub, filename)
    digest = _verified_digest(weights, hub)
    origin = Origin(text, "huggingface", hub.repo_id, commit_of(weights), weights.name, digest)
    logger.info("using %s of %s (sha256 %s)", weights.name, origin, digest[:12])
    return ResolvedSource(weights, sidecar, origin)


def _fetch_weights(hub: Hub, filename: str | None) -> Path:
    for name in (filename,) if filename else WEIGHT_NAMES:
        try:
            return hub.fetch(name)
        except Missing:
            continue
        except NotCached:
            if not hub.local_files_only:
                raise hub.unavailable(name) from None
    if hub.local_files_only:
        return _cached_weights(hub, filename)
    names = hub.list_files()
    chosen = _choose_weights(names, filename)
    if chosen is None:
        wanted = filename or f"{WEIGHT_NAMES[0]} (or _best, _latest, or one .safetensors)"
        raise SourceNotFound(f"{hub} has no {wanted}; it holds {_listing(names)}")
    return hub.fetch(chosen)


def _cached_weights(hub: Hub, filename: str | None) -> Path:
    """The weights under a name of their own, in the cached snapshot that the plan lies in."""
    try:
        snapshot = hub.fetch(SIDECAR_NAME).parent
    except (Missing, NotCached):
        raise hub.unavailable(filename or WEIGHT_NAMES[0]) from None
    chosen = _choose_weights(sorted(p.name for p in snapshot.iterdir()), filename)
    if chosen is None:
        raise hub.unavailable(filename or WEIGHT_NAMES[0])
    return snapshot / chosen


def _verified_digest(weights: Path, hub: Hub) -> str:
    """SHA-256 of the file, checked against the name that the hub's cache gives to large files."""
    digest = _digest(weights)
    recorded = weights.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", recorded) and recorded != digest:
        raise DigestMismatch(
            f"{weights.name} of {hub} in the cache is damaged (sha256 {digest[:12]}…, expected {recorded[:12]}…): "
            f"delete {weights.resolve()} and run the same command again"
        )
    return digest

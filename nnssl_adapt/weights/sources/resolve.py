"""Where pre-trained weights come from: what the user meant, found on this machine or fetched.

A source is a file, a folder, a zip, a trained model folder, a web address, or a repository on the Hugging Face hub.
Everything ends as files on this machine, chosen by the rules of ``choosing.py`` and checked against what was recorded
about them.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

from nnssl_adapt.errors import SourceError, SourceNotFound
from nnssl_adapt.paths import downloads_folder, pretrained_models_folder
from nnssl_adapt.weights.sources.archive import is_archive
from nnssl_adapt.weights.sources.choosing import choose_files
from nnssl_adapt.weights.sources.download import Address, download
from nnssl_adapt.weights.sources.file_names import WEIGHT_NAMES, Chosen
from nnssl_adapt.weights.sources.hub import Hub, commit_of
from nnssl_adapt.weights.sources.hub_files import HubAddress, fetch_files, is_hub_url, verified_digest
from nnssl_adapt.weights.sources.local import resolve_archive, resolve_path
from nnssl_adapt.weights.sources.offline_store import find_on_shelf, has_revision
from nnssl_adapt.weights.sources.resolved import Origin, ResolvedSource, assemble

logger = logging.getLogger(__name__)

__all__ = ["Origin", "ResolvedSource", "WEIGHT_NAMES", "resolve_source"]

_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_source(
    source: str | Path,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    filename: str | None = None,
    fold: str | None = None,
) -> ResolvedSource:
    """Find weights, downloading and unpacking them if need be.

    Args:
        source: a weight file (``.pth``, ``.safetensors``, ``.ckpt``, …), a zip, a folder with one, a trained nnU-Net model
            folder; a hub id ``owner/name`` or ``owner/name@revision``, or a hub address
            ``https://huggingface.co/owner/name[/tree/REVISION]``; or the https address of a file or zip, at best with
            ``#sha256=…``. An existing path wins; then the same name below ``$nnssl_pretrained_models``; then caches and
            the network.
        revision: branch, tag or commit on the hub (default: its main branch). A commit pins the branch or tag that
            ``source`` names.
        cache_dir: where downloads are kept and zips unpacked, if not in the usual caches.
        local_files_only: never use the network (as does ``HF_HUB_OFFLINE=1``).
        filename: the weight file in the folder, archive or repository, if not one of nnssl's names; or which of several
            trained model folders.
        fold: of a trained model folder: which fold, or ``mean`` for the average of all. Default: the only one, else
            ``all``, else the first.

    Raises:
        SourceNotFound: no such path, repository, revision or file, or several that fit.
        SourceAccessDenied: the repository is gated or private.
        SourceUnavailable: the hub or server can't be reached or the transfer broke off, and nothing is cached.
        DigestMismatch: a file is not what was recorded, or not what the hub says it is.
        SourceError: an archive is damaged or dangerous; an address is a web page; a 2D network.
    """
    text = str(source).strip()
    if not text:
        raise SourceNotFound("no source given: name a file, a folder or a Hugging Face id (owner/name)")
    cache = Path(cache_dir).expanduser() if cache_dir else downloads_folder()
    path = _existing_path(text)
    if path is not None:
        if revision and not has_revision(path, revision):
            raise SourceError(f"{text} is on this machine and has no revision {revision!r}: leave the revision out")
        return resolve_path(text, path, filename, fold, cache)
    hub = HubAddress.parse(text)
    on_shelf = find_on_shelf(text, revision, filename)
    if on_shelf is not None:
        return resolve_path(text, on_shelf[0], on_shelf[1], fold, cache)
    if hub is not None:
        return _resolve_hub(text, hub, revision, cache_dir, local_files_only, filename or hub.filename, fold)
    if "://" in text and not is_hub_url(text):
        if revision:
            raise SourceError(f"{text} is no Hugging Face repository and has no revision {revision!r}: leave it out")
        return _resolve_web(text, cache, local_files_only, filename, fold)
    raise SourceNotFound(_not_found_message(text))


def _existing_path(text: str) -> Path | None:
    if "://" in text:
        return None
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # too long for a path; a home of nobody
        return None


def _not_found_message(text: str) -> str:
    if "://" in text:
        return f"{text} is no Hugging Face address (https://huggingface.co/owner/name[/tree/REVISION])"
    below = pretrained_models_folder()
    searched = f"the working folder and nnssl_pretrained_models={below}" if below else "the working folder"
    return f"no file or folder {text!r} (looked in {searched}), and it is no Hugging Face id (owner/name)"


def _resolve_web(
    text: str, cache: Path, local_files_only: bool, filename: str | None, fold: str | None
) -> ResolvedSource:
    path, digest = download(Address.parse(text), cache, local_files_only)
    if is_archive(path):
        return resolve_archive(text, "url", path, filename, fold, cache)
    chosen = choose_files([path.name], text, filename, fold) if filename or fold else Chosen((path.name,))
    return assemble(text, "url", path.parent, chosen, lambda _path: digest)


def _resolve_hub(
    text: str,
    address: HubAddress,
    revision: str | None,
    cache_dir: str | Path | None,
    local_files_only: bool,
    filename: str | None,
    fold: str | None,
) -> ResolvedSource:
    named = address.revision
    pinned = revision is not None and _COMMIT.fullmatch(revision) and not _COMMIT.fullmatch(named or "")
    if revision and named and revision != named and not pinned:
        raise SourceError(f"two revisions asked for: {named!r} in {text!r} and {revision!r}; give one")
    hub = Hub(address.repo_id, revision or named, cache_dir, local_files_only)
    root, chosen = fetch_files(hub, filename, fold)
    first = root / chosen.weights[0]
    if is_archive(first):
        verified_digest(first, hub)
        cache = Path(cache_dir).expanduser() if cache_dir else downloads_folder()
        resolved = resolve_archive(text, "huggingface", first, filename, fold, cache)
    else:
        resolved = assemble(text, "huggingface", root, chosen, lambda path: verified_digest(path, hub))
    origin = replace(resolved.origin, repo_id=hub.repo_id, revision=commit_of(first))
    logger.info("using %s of %s (sha256 %s)", origin.filename, origin, origin.sha256[:12])
    return replace(resolved, origin=origin)

"""Where pre-trained weights come from: what the user meant, found on this machine or fetched.

A source is a file, a folder, a zip, a trained model folder, a web address, or a repository on the Hugging Face hub.
Everything ends as files on this machine, chosen by the rules of ``listing.py`` and checked against what was recorded
about them.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

from nnssl_adapt.errors import SourceError, SourceNotFound
from nnssl_adapt.paths import pretrained_models_folder
from nnssl_adapt.text import did_you_mean
from nnssl_adapt.weights.sources.archive import is_archive
from nnssl_adapt.weights.sources.download import Address, download
from nnssl_adapt.weights.sources.hub import Hub, commit_of
from nnssl_adapt.weights.sources.hub_files import HubAddress, fetch_files, is_hub_url, verified_digest
from nnssl_adapt.weights.sources.listing import Chosen, choose_files
from nnssl_adapt.weights.sources.local import resolve_archive, resolve_path
from nnssl_adapt.weights.sources.offline_store import find_in_store, has_revision
from nnssl_adapt.weights.sources.published import PublishedModel, address_of, find_published, published_models
from nnssl_adapt.weights.sources.resolved import ResolvedSource, SourceOptions, assemble

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_source(source: str | Path, options: SourceOptions | None = None) -> ResolvedSource:
    """Find weights, downloading and unpacking them if need be.

    Args:
        source: a weight file (``.pth``, ``.safetensors``, ``.ckpt``, …), a zip, a folder with one, a trained nnU-Net model
            folder; a hub id ``[hf://]owner/name`` or ``owner/name@revision``, or a hub address
            ``https://huggingface.co/owner/name[/tree/REVISION]``; the https address of a file or zip, at best with
            ``#sha256=…``; or a short name of the catalogue (``openmind-resencl-mae``). An existing path wins;
            then the same name below ``$nnssl_pretrained_models``; then caches and the network.
        options: revision, cache, file and fold; see :class:`SourceOptions`.

    Raises:
        SourceNotFound: no such path, repository, revision or file, or several that fit.
        SourceAccessDenied: the repository is gated or private.
        SourceUnavailable: the hub or server can't be reached or the transfer broke off, and nothing is cached.
        DigestMismatch: a file is not what was recorded, or not what the hub says it is.
        SourceError: an archive is damaged or dangerous; an address is a web page.
    """
    options = options or SourceOptions()
    text = str(source).strip()
    if not text:
        raise SourceNotFound("no source given: name a file, a folder or a Hugging Face id (owner/name)")
    path = _existing_path(text)
    if path is not None:
        if options.revision and not has_revision(path, options.revision):
            raise SourceError(
                f"{text} is on this machine and has no revision {options.revision!r}: leave the revision out"
            )
        return resolve_path(text, path, options)
    hub = HubAddress.parse(text)
    stored = find_in_store(text, options.revision, options.filename)
    if stored is not None:
        return resolve_path(text, stored[0], replace(options, filename=stored[1]))
    if hub is None and (known := find_published(text)) is not None:
        return _resolve_published(known, options)
    if hub is not None:
        return _resolve_hub(text, hub, options)
    if "://" in text and not is_hub_url(text):
        if options.revision:
            raise SourceError(
                f"{text} is not a Hugging Face repository and has no revision {options.revision!r}: leave it out"
            )
        return _resolve_web(text, options)
    raise SourceNotFound(_not_found_message(text))


def _resolve_published(known: PublishedModel, options: SourceOptions) -> ResolvedSource:
    """The files of an entry of the catalogue. Raises SourceNotFound, with its page, where its address leads nowhere."""
    address = address_of(known)
    try:
        return resolve_source(address, options)
    except SourceNotFound as error:
        raise SourceNotFound(
            f"{known.id} is not where the catalogue says ({address}): {error}. Look for it on {known.page}; a file that you "
            "download is taken by its path"
        ) from error


def _existing_path(text: str) -> Path | None:
    if "://" in text:
        return None
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # too long for a path; the home of an unknown user
        return None


def _not_found_message(text: str) -> str:
    if "://" in text:
        return f"{text} is not a Hugging Face address (https://huggingface.co/owner/name[/tree/REVISION])"
    below = pretrained_models_folder()
    searched = f"the working folder and nnssl_pretrained_models={below}" if below else "the working folder"
    close = did_you_mean(text.casefold(), (model.id for model in published_models()))
    return (
        f"no file or folder {text!r} (looked in {searched}), and it is not a Hugging Face id (owner/name), nor a network of "
        f"'nnssl-adapt models --published'{close}"
    )


def _resolve_web(text: str, options: SourceOptions) -> ResolvedSource:
    path, digest = download(Address.parse(text), options.cache, options.local_files_only)
    if is_archive(path):
        return resolve_archive(text, "url", path, options)
    filename, fold = options.filename, options.fold
    chosen = choose_files([path.name], text, filename, fold) if filename or fold else Chosen((path.name,))
    return assemble(text, "url", path.parent, chosen, lambda _path: digest)


def _resolve_hub(text: str, address: HubAddress, options: SourceOptions) -> ResolvedSource:
    address = address.with_branch(Hub(address.repo_id, None, options.cache_dir, options.local_files_only))
    options = replace(options, filename=options.filename or address.filename)
    revision, named = options.revision, address.revision
    pinned = revision is not None and _COMMIT.fullmatch(revision) and not _COMMIT.fullmatch(named or "")
    if revision and named and revision != named and not pinned:
        raise SourceError(f"two revisions requested: {named!r} in {text!r} and {revision!r}; give one")
    hub = Hub(address.repo_id, revision or named, options.cache_dir, options.local_files_only)
    root, chosen = fetch_files(hub, options.filename, options.fold)
    first = root / chosen.weights[0]
    if is_archive(first):
        verified_digest(first, hub)
        resolved = resolve_archive(text, "huggingface", first, options)
    else:
        resolved = assemble(text, "huggingface", root, chosen, lambda path: verified_digest(path, hub))
    origin = replace(resolved.origin, repo_id=hub.repo_id, revision=commit_of(first))
    logger.info("using %s of %s (sha256 %s)", origin.filename, origin, origin.sha256[:12])
    return replace(resolved, origin=origin)
